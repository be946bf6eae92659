"""Check saved weights while others are still written: each in a thread, as soon as all its tensors are in the file."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

from export.forms.dequantize_linear import RewrittenSite
from export.verify.sites import check_site
from stages.commands.options import AccuracyLevel
from stages.commands.progress import progress_bar
from stages.errors import GraphError
from stages.model.load import external_tensors
from stages.quantization.weights.validate import CHECKED_AT_ONCE
from stages.records.formats import QuantSpec, WeightForm
from stages.records.results import SiteError
from stages.system.hardware import one_thread_each

VerifyLevel = Literal["full", "quick"]
_TOLERANCE = {
    # Sums of a few thousand float32 products in another order.
    "float32": 1e-4,
    # The output itself is rounded to float16, twice where a Q is folded: a few times 2^-11.
    "float16": 2e-3,
    # Computed in float32, with numbers that bfloat16 holds.
    "bfloat16": 1e-4,
}
_ROUNDED_WEIGHT_TOLERANCE = {
    **_TOLERANCE,
    # The float form rounds the weight itself to bfloat16, 2^-9, and quantizes it again when it runs.
    "bfloat16": 1e-2,
}


class SiteChecks:
    """The checks of all quantized MatMuls of a model; leaving the block drops those that haven't begun.

    The default level, which depends on shapes and formats only, is measured once for each of these.

    Args:
        onnx_file: the saved graph, which is there before its data file is whole.
        sites: what is written into its MatMuls.
        level: "quick" leaves out the products.
    """

    def __init__(self, onnx_file: Path, sites: Sequence[RewrittenSite], level: VerifyLevel) -> None:
        self.onnx_file, self.sites, self.level = onnx_file, sites, level
        self._levels = dict(zip((site.output for site in sites), _levels(sites, level), strict=True))
        threads = torch.get_num_threads()
        workers = min(threads, CHECKED_AT_ONCE)
        self._pool, self._threads = one_thread_each(workers), threads // workers
        self._running: dict[str, Future[tuple[float, ...]]] = {}
        self._failed: list[Future[tuple[float, ...]]] = []

    def __enter__(self) -> SiteChecks:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @cached_property
    def model(self) -> ir.Model:
        """Return the saved graph."""
        return ir.load(self.onnx_file)

    @cached_property
    def nodes(self) -> dict[str, ir.Node]:
        """Return the saved nodes by their outputs."""
        return {str(output.name): node for node in self.model.graph.all_nodes() for output in node.outputs}

    @cached_property
    def _missing(self) -> dict[str, set[str]]:
        """Return what isn't in the data file yet, by sites' outputs."""
        outside = {str(tensor.name) for tensor in external_tensors(self.model)}
        return {
            site.output: outside & {str(name) for name in (site.weight, site.scales, site.zero_points, site.steps)}
            for site in self.sites
        }

    @cached_property
    def _readers(self) -> dict[str, list[RewrittenSite]]:
        """Return the sites that a tensor of the data file belongs to."""
        found: dict[str, list[RewrittenSite]] = {}
        for site in self.sites:
            for name in self._missing[site.output]:
                found.setdefault(name, []).append(site)
        return found

    def written(self, name: str) -> None:
        """Begin the checks that only lacked tensor ``name`` of the data file.

        Raises:
            GraphError: a check that was begun before found something.
        """
        for site in self._readers.get(name, ()):
            missing = self._missing[site.output]
            missing.discard(name)
            if not missing:
                self._begin(site)
        for check in self._failed:
            check.result()

    def results(self) -> list[SiteError]:
        """Wait for all checks; return the errors of the products, none where these are left out.

        Raises:
            GraphError: a code, a scale or a product isn't what it should be, or ONNX Runtime refuses a weight.
        """
        errors, defaults = list[SiteError](), dict[_Kind, float]()
        for site in self.sites:
            self._begin(site)
        with progress_bar() as bar:
            for site in bar.track(self.sites, description="checking weights", unit="sites"):
                found = self._running[site.output].result()
                if found:
                    exact, *default = found
                    defaults.update((_kind(site), error) for error in default)
                    name = site.source.site.name
                    errors.append(SiteError(site=name, exact=exact, default=defaults[_kind(site)]))
        return errors

    def _begin(self, site: RewrittenSite) -> None:
        if site.output not in self._running:
            node = self.nodes[site.output]
            check = self._pool.submit(self._check, node, site, self._levels[site.output])
            check.add_done_callback(self._note)
            self._running[site.output] = check

    def _note(self, check: Future[tuple[float, ...]]) -> None:
        if not check.cancelled() and check.exception() is not None:
            self._failed.append(check)

    def _check(self, node: ir.Node, site: RewrittenSite, levels: tuple[AccuracyLevel | None, ...]) -> tuple[float, ...]:
        errors = check_site(self.onnx_file.parent, node, site, levels, self._threads)
        tolerances = _ROUNDED_WEIGHT_TOLERANCE if site.form is WeightForm.QDQ else _TOLERANCE
        tolerance = tolerances[site.source.site.dtype]
        if errors and not errors[0] < tolerance:
            raise GraphError(
                f"The saved weight of '{site.source.site.name}' gives outputs {errors[0]:.1e} away from its own "
                f"numbers (at most {tolerance:.0e} is rounding) on ONNX Runtime; try another version of it."
            )
        return errors


_Kind = tuple[WeightForm, QuantSpec, int, int]


def _kind(site: RewrittenSite) -> _Kind:
    """Return what the error at the default level depends on."""
    source = site.source
    return site.form, source.spec, source.site.in_features, source.site.out_features


def _levels(sites: Sequence[RewrittenSite], level: VerifyLevel) -> list[tuple[AccuracyLevel | None, ...]]:
    """Return the accuracy levels at which each site's product is measured."""
    if level == "quick":
        return [()] * len(sites)
    first = {_kind(site): site.output for site in reversed(sites)}
    return [(1, None) if first[_kind(site)] == site.output else (1,) for site in sites]

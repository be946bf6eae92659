"""Verify an export before it gets its name: bytes, codes, fusion, and every site's product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from pydantic import TypeAdapter

from export.forms.dequantize_linear import RewrittenSite
from export.forms.embedding import RewrittenTable
from export.forms.qmoe import RewrittenExperts
from export.forms.rotary import ComputedTable
from export.save import account_for_bytes, data_name
from export.verify.embeddings import check_stored_table, measure_table
from export.verify.experts import check_stored_experts, measure_experts
from export.verify.fusion import CannotRun, run_one_token, runtime_version, why_not_fused
from export.verify.rotary import measure_computed
from export.verify.sites import check_site
from stages.commands.progress import progress_bar
from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.quantization.weights.store import VERIFICATION
from stages.records.formats import QuantSpec, WeightForm
from stages.records.results import ExpertsError, SiteError, UnfusedSite, VerifyReport
from stages.runtime.cpu.norms import must_write_out_norms
from stages.runtime.cpu.upcast import must_upcast
from stages.runtime.providers import CPU_ONLY
from stages.system.atomic import atomic_file

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


def verify(
    onnx_file: Path,
    sites: Sequence[RewrittenSite],
    base: ModelDirectory,
    level: Literal["full", "quick"],
    tables: Sequence[RewrittenTable] = (),
    experts: Sequence[RewrittenExperts] = (),
    computed: Sequence[ComputedTable] = (),
) -> VerifyReport:
    """Check a saved model against the weights that it was made from.

    Args:
        onnx_file: the saved model.
        sites: what was written into its MatMuls.
        base: where the inputs of one token are described.
        level: "quick" leaves out the products of single weights.
        tables: what was written into its embeddings.
        experts: what was written into its QMoE nodes.
        computed: its tables of rotary embeddings that nodes make.

    Raises:
        GraphError: a byte, a code, a scale or a product isn't what it should be, or ONNX Runtime refuses the model.
    """
    model = ir.load(onnx_file)
    data = account_for_bytes(model, onnx_file.with_name(data_name(onnx_file.name)))
    nodes = {output.name: node for node in model.graph.all_nodes() for output in node.outputs}
    pairs = [(nodes[site.output], site) for site in sites]
    errors = _check_sites(onnx_file.parent, pairs, level)
    lookups = [(nodes[table.plan.table.gathers[0]], table) for table in tables]
    for node, table in lookups:
        check_stored_table(node, table)
    mixtures = [(nodes[each.layer.output], each) for each in experts]
    for node, mixture in mixtures:
        check_stored_experts(node, mixture)
    proof = _prove_fusion(onnx_file, pairs, base, frozenset(each.layer.output for each in experts))
    return VerifyReport(
        sites=len(sites),
        data=data,
        fused=proof.fused,
        unfused=proof.unfused,
        worst_exact=max(errors, key=lambda error: error.exact, default=None),
        worst_default=max(errors, key=lambda error: error.default, default=None),
        skipped=proof.skipped,
        tables=tuple(measure_table(onnx_file.parent, *lookup) for lookup in lookups) if level == "full" else (),
        experts=_measure_experts(onnx_file.parent, mixtures) if level == "full" else (),
        rotary=tuple(measure_computed(onnx_file.parent, model.graph, nodes[each.output], each) for each in computed)
        if level == "full"
        else (),
        widened=must_upcast(model, CPU_ONLY),
        norms_written_out=proof.fused is not None and proof.provider == "CPU" and must_write_out_norms(model, CPU_ONLY),
        provider=proof.provider,
    )


def save_report(report: VerifyReport, folder: Path) -> None:
    """Write every figure and every unfused site as verification.json, whole or not at all."""
    with atomic_file(folder / VERIFICATION) as partial:
        partial.write_bytes(TypeAdapter(VerifyReport).dump_json(report, indent=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """What a run of one token told."""

    fused: int | None = None
    unfused: tuple[UnfusedSite, ...] = ()
    skipped: tuple[str, ...] = ()
    provider: str = "CPU"


def _prove_fusion(
    onnx_file: Path, pairs: list[tuple[ir.Node, RewrittenSite]], base: ModelDirectory, others: frozenset[str]
) -> _Proof:
    """Run one token.

    Args:
        onnx_file: the saved model.
        pairs: its quantized MatMuls.
        base: describes its inputs.
        others: values that are computed too.
    """
    try:
        run = run_one_token(onnx_file, others | {site.output for _, site in pairs}, base)
    except CannotRun as reason:
        return _Proof(skipped=(f"whether the model runs and its sites are fused: {reason}",))
    version = runtime_version()
    unfused = tuple(
        UnfusedSite(site=site.source.site.name, reason=why_not_fused(node, _as_computed(site), version))
        for node, site in pairs
        if site.node not in run.nodes or (run.provider == "CPU" and _fuses_only_upcast(site))
    )
    return _Proof(fused=len(pairs) - len(unfused), unfused=unfused, provider=run.provider)


def _as_computed(site: RewrittenSite) -> QuantSpec:
    """Return the format with scales of the type in which the runtime reads them."""
    return replace(site.source.spec, scale_dtype=site.source.site.dtype)


def _fuses_only_upcast(site: RewrittenSite) -> bool:
    """Say whether the CPU fused what was bfloat16: where the model runs as it is, nothing fuses it."""
    return site.source.site.dtype == "bfloat16" and site.form is not WeightForm.MATMUL_NBITS


def _measure_experts(folder: Path, mixtures: list[tuple[ir.Node, RewrittenExperts]]) -> tuple[ExpertsError, ...]:
    with progress_bar() as bar:
        steps = bar.track(mixtures, description="checking experts", unit="nodes")
        return tuple(measure_experts(folder, node, mixture) for node, mixture in steps)


def _check_sites(
    folder: Path, pairs: list[tuple[ir.Node, RewrittenSite]], level: Literal["full", "quick"]
) -> list[SiteError]:
    """Check all weights; the default level, which depends on shapes and formats only, is measured once for each."""
    errors, defaults = list[SiteError](), dict[tuple[WeightForm, QuantSpec, int, int], float]()
    with progress_bar() as bar:
        for node, site in bar.track(pairs, description="checking weights", unit="sites"):
            source = site.source.site
            kind = site.form, site.source.spec, source.in_features, source.out_features
            if level == "quick":
                check_site(folder, node, site, ())
                continue
            exact, *default = check_site(folder, node, site, (1,) if kind in defaults else (1, None))
            defaults.update((kind, error) for error in default)
            tolerances = _ROUNDED_WEIGHT_TOLERANCE if site.form is WeightForm.QDQ else _TOLERANCE
            tolerance = tolerances[source.dtype]
            if not exact < tolerance:
                raise GraphError(
                    f"The saved weight of '{source.name}' gives outputs {exact:.1e} away from its own numbers "
                    f"(at most {tolerance:.0e} is rounding) on ONNX Runtime; try another version of it."
                )
            errors.append(SiteError(site=source.name, exact=exact, default=defaults[kind]))
    return errors

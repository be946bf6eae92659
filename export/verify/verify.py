"""Verify an export before it gets its name: bytes, codes, fusion, and every site's product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from export.verify.while_written import SiteChecks
from stages.commands.progress import progress_bar
from stages.model.directory import ModelDirectory
from stages.quantization.weights.store import VERIFICATION
from stages.records.formats import QuantSpec, WeightForm
from stages.records.results import ExpertsError, UnfusedSite, VerifyReport
from stages.runtime.cpu.norms import must_write_out_norms
from stages.runtime.cpu.upcast import must_upcast
from stages.runtime.providers import CPU_ONLY
from stages.system.atomic import atomic_file


def verify(
    checks: SiteChecks,
    base: ModelDirectory,
    tables: Sequence[RewrittenTable] = (),
    experts: Sequence[RewrittenExperts] = (),
    computed: Sequence[ComputedTable] = (),
) -> VerifyReport:
    """Check a saved model against the weights that it was made from.

    Args:
        checks: of what was written into its MatMuls, begun or not; at "quick" single products are left out.
        base: where the inputs of one token are described.
        tables: what was written into its embeddings.
        experts: what was written into its QMoE nodes.
        computed: its tables of rotary embeddings that nodes make.

    Raises:
        GraphError: a byte, a code, a scale or a product isn't what it should be, or ONNX Runtime refuses the model.
    """
    onnx_file, model, nodes, is_full = checks.onnx_file, checks.model, checks.nodes, checks.level == "full"
    data = account_for_bytes(model, onnx_file.with_name(data_name(onnx_file.name)))
    errors = checks.results()
    lookups = [(nodes[table.plan.table.gathers[0]], table) for table in tables]
    for node, table in lookups:
        check_stored_table(node, table)
    mixtures = [(nodes[each.layer.output], each) for each in experts]
    for node, mixture in mixtures:
        check_stored_experts(node, mixture)
    proof = _prove_fusion(checks, base, frozenset(each.layer.output for each in experts))
    return VerifyReport(
        sites=len(checks.sites),
        data=data,
        fused=proof.fused,
        unfused=proof.unfused,
        worst_exact=max(errors, key=lambda error: error.exact, default=None),
        worst_default=max(errors, key=lambda error: error.default, default=None),
        skipped=proof.skipped,
        tables=tuple(measure_table(onnx_file.parent, *lookup) for lookup in lookups) if is_full else (),
        experts=_measure_experts(onnx_file.parent, mixtures) if is_full else (),
        rotary=tuple(measure_computed(onnx_file.parent, model.graph, nodes[each.output], each) for each in computed)
        if is_full
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


def _prove_fusion(checks: SiteChecks, base: ModelDirectory, others: frozenset[str]) -> _Proof:
    """Run one token.

    Args:
        checks: know the saved model and its quantized MatMuls.
        base: describes its inputs.
        others: values that are computed too.
    """
    outputs = others | {site.output for site in checks.sites}
    try:
        run = run_one_token(checks.onnx_file, outputs, base, checks.model)
    except CannotRun as reason:
        return _Proof(skipped=(f"whether the model runs and its sites are fused: {reason}",))
    version = runtime_version()
    unfused = tuple(
        UnfusedSite(
            site=site.source.site.name, reason=why_not_fused(checks.nodes[site.output], _as_computed(site), version)
        )
        for site in checks.sites
        if site.node not in run.nodes or (run.provider == "CPU" and _fuses_only_upcast(site))
    )
    return _Proof(fused=len(checks.sites) - len(unfused), unfused=unfused, provider=run.provider)


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

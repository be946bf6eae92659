"""Show the GPU check as one table."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmarks.gpu.figures import GpuCheck
from stages.commands.tables import FactTable


def check_table(found: GpuCheck) -> FactTable:
    """Return one row for each thing that was found."""
    machine = found.machine
    where = machine.gpu or f"the CPU, {machine.processor}: a trial of the steps"
    return FactTable(title=f"GPU check on {where} ({found.size} shapes)", facts=tuple(_facts(found)))


def _facts(found: GpuCheck) -> Iterator[tuple[str, str]]:
    if (placement := found.placement) is not None:
        yield "base runs on", f"{placement.provider}, activations stay on {placement.outputs}"
        for provider, why in placement.missing:
            yield "not used", f"{provider}: {why}"
    for fusion in found.fusion:
        options = fusion.options or "own choice"
        yield "fused", f"{fusion.fused} of {fusion.sites}: {fusion.precision}, {options} ({fusion.formats})"
    for layer in found.layers:
        memory = _memory(layer.device_peak_bytes)
        yield "search", f"{layer.seconds:.2f} s{memory}: {layer.group}, {layer.in_features} x {layer.out_features}"
    for step in found.steps:
        yield "step", f"{step.seconds:.1f} s{_memory(step.device_peak_bytes)}: {step.name}"
    for whole in found.wholes:
        aim = (
            "" if whole.aim is None else f", aim {whole.aim:.0f} s: {'met' if whole.seconds <= whole.aim else 'missed'}"
        )
        yield "whole", f"{whole.seconds:.1f} s{aim}: {whole.name} ({whole.how})"
    if found.same_bits is not None:
        yield "two searches", "the same bits" if found.same_bits else "DIFFERENT bits"
    for model in found.speed.models if found.speed is not None else ():
        yield "decoding", f"{model.decode.median:.1f} tokens/s, prompt {model.prompt.median:.0f}: {model.model}"
    for name, why in found.not_done:
        yield "not done", f"{name}: {why}"


def _memory(size: int | None) -> str:
    return "" if size is None else f", {size / 1e9:.1f} GB"

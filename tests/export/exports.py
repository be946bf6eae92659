"""Make a whole tiny export: base folder, store and destination, ready to run or to spoil."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.run import ExportSummary, export_model
from export.save import Destination
from stages.commands.quantize_options import ExportOptions
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import QuantSpec, WeightForm
from stages.records.sites import LinearAbsorber, NormAbsorber
from tests.export.builders import exact_weight, group_of, input_scale, site_of, spec_of, store_of
from tests.support.graphs import tiny_decoder


@dataclass(frozen=True, kw_only=True)
class TinyExport:
    base: ModelDirectory
    store: QuantizedStore
    output: Path

    def run(self, options: ExportOptions, *, overwrite: bool = False) -> ExportSummary:
        destination = Destination.from_path(self.output, self.base, overwrite=overwrite)
        return export_model(self.base, self.store, destination, options)


def options(level: str = "full", accuracy_level: int | None = None) -> ExportOptions:
    return ExportOptions(verify=level, accuracy_level=accuracy_level)


def tiny_export(
    folder: Path,
    *,
    spec: QuantSpec | None = None,
    form: WeightForm = WeightForm.DQ,
    name: str = "quantized",
    opset: int = 21,
) -> TinyExport:
    """Quantize the tiny decoder: up's scale is folded into the norm, down's into up."""
    rng = np.random.default_rng(0)
    spec = spec or spec_of(4)
    dtype = spec.scale_dtype
    up = exact_weight(site_of("up", "x", 64, 96, dtype=dtype), spec, rng, input_scale(rng, 64))
    down = exact_weight(site_of("down", "product", 96, 64, dtype=dtype), spec, rng, input_scale(rng, 96))
    base_folder = folder / "base"
    tiny_decoder(up.matrix, down.matrix, rng, opset).save(base_folder)
    write_side_files(base_folder)
    base = locate_model(base_folder)
    groups = [
        (group_of([up], absorber=NormAbsorber(output="x", parameters=("gain",))), [up]),
        (group_of([down], absorber=LinearAbsorber(site="up/MatMul")), [down]),
    ]
    store = store_of(folder / "weights", groups, form=form, fingerprint=fingerprint_model(base))
    return TinyExport(base=base, store=store, output=folder / name)


def write_side_files(folder: Path) -> None:
    decoder = {"filename": "model.onnx", "hidden_size": 64, "session_options": {"log_id": "kept"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}, "search": {"top_k": 50}}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "a.bin").write_bytes(b"\x00\x01")

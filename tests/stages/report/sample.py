"""A report with made-up numbers that fills every part of a page."""

from __future__ import annotations

from stages.evaluation.accuracy import Accuracy, Guess, PositionBin, WorstToken
from stages.evaluation.records import (
    Answer,
    Comparison,
    Evaluation,
    Generation,
    ModelRow,
    ModelSpeed,
    Rate,
    SpeedTest,
    TaskScore,
)
from stages.model.sizes import SizePart
from stages.records.results import DataFileUse, SiteError, SiteReport, UnfusedSite, VerifyReport
from stages.report.document import (
    KeptSite,
    Origin,
    Quantization,
    QuantizedEmbedding,
    QuantizedSite,
    Report,
    SweepPoint,
    SweepTable,
)

NASTY = "<script>alert('x')</script> & \"http://example.com/x.js\""
"""What a page must show and never run."""


def quantized_site(layer: int | None, kind: str, index: int) -> QuantizedSite:
    """Return a site whose numbers differ from those of other indices."""
    name = f"/model/layers.{layer}/{kind}/MatMul" if layer is not None else f"/{kind}/MatMul"
    rounded = 0.001 * 1.37**index
    return QuantizedSite(
        layer=layer,
        kind=kind,
        in_features=64,
        out_features=96,
        report=SiteReport(
            site=name,
            algorithm="awq_full",
            format=("4b32", "8b128", "8ch")[index % 3],
            bytes=1000 + index,
            loss_rtn=rounded,
            loss=rounded / 3,
            held_out_loss_rtn=rounded * 1.1,
            held_out_loss=rounded / 2.5,
            scale_family=("activation", "duo", "identity")[index % 3],
            alpha=None if index % 3 == 2 else 0.1 * (index % 7),
            mean_clip_ratio=0.8 + 0.01 * index,
            block_loss_start=0.01 * (1 + (layer or 0)),
            block_loss=0.005 * (1 + (layer or 0)),
        ),
    )


def quantization() -> Quantization:
    kinds = ("attn/qkv_proj", "attn/o_proj", "mlp/down_proj")
    places: list[tuple[int | None, str]] = [(layer, kind) for layer in range(4) for kind in kinds]
    sites = [quantized_site(layer, kind, index) for index, (layer, kind) in enumerate([*places, (None, "lm_head")])]
    return Quantization(
        summary=f"awq_full {NASTY}",
        weight_form="dq",
        bits_per_weight=5.125,
        sites=tuple(sites),
        kept=(KeptSite(site="/model/layers.2/router/MatMul", layer=2, kind="router", reason="it is a router"),),
        embeddings=(QuantizedEmbedding(name="embed", stored="INT4, by rows", bytes=1000),),
        other_weights=("Gather: embedding (1.0 MB, 17% of the base's weights): a table",),
        sizes=(
            SizePart(name="INT4 codes", before=0, after=400_000_000),
            SizePart(name="scales", before=0, after=60_000_000),
            SizePart(name="embedding", before=100_000_000, after=100_000_000),
            SizePart(name="matrices as in the base", before=1_700_000_000, after=0),
            SizePart(name="graph and padding", before=90_000, after=120_000),
        ),
        verified=VerifyReport(
            sites=13,
            data=DataFileUse(file_bytes=5000, referenced_bytes=4000, padding_bytes=1000),
            fused=12,
            unfused=(UnfusedSite(site="/lm_head/MatMul", reason="a reason"),),
            worst_exact=SiteError(site="/lm_head/MatMul", exact=1e-6, default=1e-3),
            worst_default=SiteError(site="/lm_head/MatMul", exact=1e-6, default=1e-3),
            skipped=("nothing was skipped",),
        ),
    )


def model_row(name: str, divergence: float) -> ModelRow:
    bins = tuple(
        PositionBin(
            first=1 + 8 * index,
            last=8 + 8 * index,
            tokens=16,
            mean_divergence=divergence * (1 + 0.1 * index),
            divergence_99=divergence * (5 + index),
        )
        for index in range(5)
    )
    guesses = tuple(Guess(token=word, base=0.5, model=0.25) for word in (" a", "\n", NASTY))
    worst = WorstToken(
        window=1,
        position=9,
        divergence=2.5,
        context=f"some text\nbefore {NASTY}",
        following=guesses[0],
        base_first=guesses,
        model_first=guesses[::-1],
    )
    return ModelRow(
        name=name,
        bytes=int(1e9 * (1 - divergence)),
        accuracy=Accuracy(
            tokens=80,
            perplexity=13.5 + divergence,
            mean_divergence=divergence,
            top1_agreement=1 - divergence,
            divergence_99=6 * divergence,
        ),
        positions=bins,
        worst=(worst,) if divergence else (),
    )


def evaluation(text: str = "news.txt") -> Evaluation:
    rows = (model_row("base", 0.0), model_row("int4", 0.1), model_row("int8", 0.01))
    rate = Rate(median=20.0, slowest=18.5, fastest=21.25)
    speeds = [
        ModelSpeed(
            model=row.name,
            prompt=rate,
            decode=Rate(median=10.0 * (index + 1), slowest=9.0, fastest=11.0),
            load_seconds=1.5,
            peak_bytes=None if index else 700_000_000,
            accuracy_level="1 (by its genai_config.json)",
        )
        for index, row in enumerate(rows)
    ]
    return Evaluation(
        comparison=Comparison(
            models=tuple((row.name, "f" * 64) for row in rows),
            text=text,
            tokens="0" * 64,
            windows=2,
            seq_len=41,
            accuracy_level=1,
            providers=("CPUExecutionProvider",),
            worst=1,
        ),
        rows=rows,
        generations=(
            Generation(
                prompt=f"Say {NASTY}",
                templated=True,
                answers=tuple(Answer(model=row.name, text=f"yes, {NASTY}", tokens=9, same_tokens=4) for row in rows),
            ),
        ),
        speed=SpeedTest(
            machine="a machine",
            runtime="onnxruntime-genai 0.18.0",
            threads=1,
            rounds=5,
            prompt_tokens=128,
            new_tokens=64,
            models=tuple(speeds),
        ),
        tasks=(
            TaskScore(model="base", task="places", metric="acc", filter="", value=0.75, stderr=0.125, samples=8),
            TaskScore(model="int4", task="places", metric="acc", filter="", value=0.5, stderr=None, samples=8),
        ),
    )


def sweep_point(name: str, size: int | None, loss: float | None, *, on_front: bool = False) -> SweepPoint:
    accuracy = None if loss is None else model_row(name, loss).accuracy
    return SweepPoint(
        name=name,
        command=f"python -m stages.quantize --output_path={name}",
        bytes=size,
        bits_per_weight=5.0,
        search_seconds=10.0,
        total_seconds=20.0,
        peak_bytes=10**9,
        held_out_loss=0.01,
        accuracy=accuracy,
        loss=loss,
        on_front=on_front,
        note="" if loss is not None else "it failed",
    )


def sweep_table() -> SweepTable:
    return SweepTable(
        text="offline",
        base=model_row("base", 0.0),
        points=(
            sweep_point("small", 285_700_000, 0.2, on_front=True),
            sweep_point("large", 297_000_000, 0.1, on_front=True),
            sweep_point("beaten", 297_000_000, 0.3),
            sweep_point("failed", None, None),
        ),
    )


def whole_report() -> Report:
    """Return a report with everything that a page can show."""
    return Report(
        title=f"int4 {NASTY}",
        machine="a machine",
        origin=Origin(
            command="genai-quant quantize --onnx_path smollm",
            version="1.2",
            made="2026-11-29 13:08 UTC",
            base="smollm",
            base_fingerprint="a" * 64,
            calibration="a text: 29 windows",
        ),
        quantization=quantization(),
        evaluations=(evaluation(), evaluation("offline")),
        sweep=(sweep_table(),),
    )

"""Every table on terminals of 80 to 160 columns, with the longest names that real models have: nothing is lost."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from export.fold import FoldOutcome
from export.run import ExportSummary
from export.summary import export_table
from scripts.benchmarks.figures import Benchmark, CaptureFigure, CommandFigure, Machine, SearchFigure, WriteFigure
from scripts.benchmarks.gpu.figures import FusionFigure, GpuCheck, Placement, StepFigure, WholeFigure
from scripts.benchmarks.gpu.tables import check_table
from scripts.benchmarks.tables import benchmark_tables
from scripts.peers.speed import speed_table
from stages.calibration.cache import CacheKey
from stages.calibration.summary import CalibrationSummary, PassSummary, calibration_section
from stages.commands.tables import Column, DataTable, FactTable, wrapped
from stages.evaluation.bench.results import MeasuredModel, TextResults, means_table, results_table
from stages.evaluation.bench.runs import Search
from stages.evaluation.records import Evaluation, OutputEvaluation, OutputRow, OutputScore
from stages.inspect.artifacts import CacheReport, SweepReport, WeightsReport
from stages.inspect.float_weights import InputScaleMul, UnquantizedTensors
from stages.inspect.model import ModelReport, report_model
from stages.inspect.quantized_weights import StoredWeight
from stages.inspect.tables import cache_table, model_table, sweep_table, weights_table
from stages.model.directory import locate_model
from stages.quantization.preview.table import (
    DiskUse,
    Preview,
    PreviewedSite,
    SearchEstimate,
    SharedRun,
    StageMemory,
    preview_table,
)
from stages.quantization.targets.explain import choice_table
from stages.quantization.weights.store import QuantizedStore
from stages.quantization.weights.summary import quantization_table
from stages.records.formats import WeightForm
from stages.records.results import DataFileUse, ExportRecipe, SiteError, SiteReport, UnfusedSite, VerifyReport
from stages.records.sites import ActivationGroup, MatMulSite, UnquantizedWeights, WeightLayout
from stages.report.tables import tables_of, tables_of_outputs, tables_of_worst
from stages.system.measured_process import Cost
from tests.stages.quantization.targets.requests import choose
from tests.stages.report.sample import evaluation, model_row

ROOT = Path(__file__).parent.parent
WIDTHS = (80, 100, 120, 160)
WIDE = 10_000
FOLDER = Path("/home/somebody/models/Phi-3.5-MoE-instruct-onnx-cpu-int4-awq-block-32/gpt-oss-20b")
KINDS = (
    "self_attn/k_proj/MatMul_Quant",
    "block_sparse_moe/experts.15/gate_up_proj_blocks/MatMul_Quant",
    "mlp.experts.gate_up_proj_blocks",
    "mlp/down_proj/MatMul",
)
SITES = [f"/model/layers.{layer}/{kind}" for layer in (0, 1, 2, 9, 17, 31) for kind in KINDS]


def site_reports() -> list[SiteReport]:
    return [
        SiteReport(
            site=name,
            algorithm="awq_gptq",
            format=("4b32", "8b128", "8ch")[index % 3],
            bytes=12_345_678 + index,
            loss_rtn=0.01234,
            loss=0.00567 + index / 1e5,
            held_out_loss=0.00678 + index / 1e5,
            scale_family=("activation", "duo", "identity")[index % 3],
            alpha=None if index % 3 == 2 else 0.35,
            mean_clip_ratio=0.87,
            block_loss_start=0.0123,
            block_loss=0.0045,
            note="" if index else "no token came to this expert, so it was rounded to nearest",
        )
        for index, name in enumerate(SITES)
    ]


class FinishedStore(QuantizedStore):
    """Quantized weights without files."""

    def reports(self) -> list[SiteReport]:
        return site_reports()


def search() -> DataTable:
    sites = tuple(
        MatMulSite(
            name=name, op_type="MatMul", weight="w", activation="x", output=name, in_features=2880, out_features=5760,
            layout=WeightLayout.K_BY_N, dtype="float16",
        )
        for name in SITES
    )  # fmt: skip
    recipe = ExportRecipe(
        model_fingerprint="f",
        weight_form=WeightForm.DQ,
        fold_input_scales=True,
        groups=(ActivationGroup(activation="x", in_features=2880, sites=sites, absorber=None),),
        kept=(),
        search="s",
        summary="awq_gptq INT4 block 32 without zero point, INT8 at 8 sites",
    )
    return quantization_table(FinishedStore(FOLDER, recipe), 3725.4)


def plan() -> RenderableType:
    sites = [
        PreviewedSite(
            name=name,
            in_features=1536,
            out_features=100_352,
            format=("4b32", "8ch", "keep")[index % 3],
            formats=("4b128", "4b64", "4b32", "8b128") if index == 5 else (),
            bits=(4, 8, None)[index % 3],
            block_size=32,
            zero_point=index % 2 == 0,
            why=("", "--layers_8bit down_proj", "its router decides which experts a token goes to")[index % 3],
            bytes_before=1_234_500_000,
            bytes_after=345_600_000,
            input_scale=("norm", "mul", "none")[index % 3],
            input_scale_into="x",
            input_scale_why="the activation is also read by 3 experts that aren't quantized" if index % 3 == 1 else "",
            seconds=1234.5,
        )
        for index, name in enumerate(SITES)
    ]
    return preview_table(
        Preview(
            base=FOLDER / "model.onnx",
            output=FOLDER / "int4",
            recipe="awq_gptq INT4 block 32 without zero point",
            sites=tuple(sites),
            unquantizable=tuple((name, "both inputs vary") for name in SITES),
            embeddings=(),
            unreached=unreached(),
            bits_per_weight=4.625,
            bytes_before=41_234_500_000,
            bytes_after=12_345_600_000,
            unspent=22_345_600_000,
            memory=(StageMemory(stage="search and export", bytes=23_456_000_000, holds="the largest group"),),
            disk=DiskUse(calibration=9_160_000_000, weights=23_456_000_000, output=12_345_600_000),
            search=SearchEstimate(seconds=12_345.0, device="cuda:1", groups=4321),
            sharing=tuple(shared_run(count) for count in (1, 8, 64)),
            obstacles=(f"--output_path {FOLDER / 'int4'} already exists; pass --overwrite or choose another path.",),
            notes=("--accuracy_level 1 runs INT8 weights about 10 times slower than level 4",),
            target="cpu@1.32",
            target_because="the base's operators and genai_config.json name no other provider",
            formats=choose("cpu").explanations,
        )
    )


def shared_run(processes: int) -> SharedRun:
    return SharedRun(
        processes=processes, calibrate_seconds=774_000.0, search_seconds=1_227_600.0, memory_first=52_912_345_678,
        memory_others=None if processes == 1 else 41_123_456_789, read=10_312_345_678_901, written=851_234_567_890,
        sent=812_345_678_901,
    )  # fmt: skip


def unreached() -> tuple[UnquantizedWeights, ...]:
    names = ("model.layers.31.mlp.experts.gate_up_proj_blocks", "b")
    return (UnquantizedWeights(op_type="QMoE", weights=names, num_bytes=31_234_500_000, share=0.923, reason="experts"),)


def exported() -> RenderableType:
    error = SiteError(site=SITES[1], exact=1.6e-06, default=1.2e-02)
    report = VerifyReport(
        sites=1234,
        data=DataFileUse(file_bytes=295_085_312_768, referenced_bytes=295_085_312_000, padding_bytes=768),
        fused=1230,
        unfused=tuple(
            UnfusedSite(site=name, reason="block size 8 is not a power of two from 16 to 256") for name in SITES
        ),
        worst_exact=error,
        worst_default=error,
        skipped=("lookups: no GatherBlockQuantized kernel here",),
    )
    folds = [FoldOutcome(activation="a", sites=(SITES[0],), how="mul", reason=f"{SITES[0]} reads it")] * 12
    summary = ExportSummary(
        onnx_file=FOLDER / "model.onnx",
        bytes_before=653_612_345_678,
        bytes_after=115_112_345_678,
        folds=tuple(folds),
        kept=((SITES[3], "--exclude lm_head"),),
        report=report,
        notes=("a note",),
        unreached=unreached(),
    )
    return export_table(summary)


def calibrated() -> RenderableType:
    made = PassSummary(
        tokenizer=str(FOLDER), matmuls=1234, as_rows=567, partitions=8, widened=True,
        unused=(("NvTensorRtRtx", "onnxruntime here has no such provider"),), seconds=4321.5,
    )  # fmt: skip
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    key = CacheKey(
        model_fingerprint="m", token_fingerprint="t", source="cnn_dailymail 3.0.0, train", calibration_windows=115,
        held_out_windows=13, seq_len=2048, providers=providers, token_weights="end loss",
    )  # fmt: skip
    summary = CalibrationSummary(
        cache=FOLDER, bytes=5_123_000_000, key=key, activations=1021, channels=28672, made=made
    )
    table = calibration_section(summary).table
    assert isinstance(table, FactTable)
    return table


def inspected(tiny: ModelReport) -> RenderableType:
    quantized = [
        StoredWeight(
            node=name,
            operators=("DequantizeLinear", "Transpose", "MatMul") if index % 2 else ("GatherBlockQuantized",),
            initializers=(f"w{index}",),
            codes="FLOAT4E2M1",
            bits=4,
            grouping="block",
            block_size=128,
            zero_point=bool(index % 2),
            scales="FLOAT16",
            computed="FLOAT",
            shape=(2880, 5760),
            bytes=9_331_200 + index * 100_000,
            activations="float",
            accuracy_level=4,
        )
        for index, name in enumerate(SITES)
    ]
    left = UnquantizedTensors(
        reader="SkipSimplifiedLayerNormalization", kind=KINDS[1], type="FLOAT16", count=1234, bytes=123_456_789
    )
    scales = InputScaleMul(node=f"{SITES[0]}/input_scale/Mul", channels=2880, readers=(SITES[0],))
    return model_table(replace(tiny, quantized=tuple(quantized), left=(left,), input_scales=(scales,)))


def measured_models() -> tuple[MeasuredModel, ...]:
    return tuple(
        MeasuredModel(
            name=f"{name}-b128-zp-mixed-int8b128-head8",
            command=f"python -m stages.quantize {name}",
            unbeaten=index == 0,
            note="8 windows" if index == 1 else "",
            failure="--block_size 24 is not a power of two from 16 to 256." if index == 2 else None,
            bytes=12_345_600_000,
            cost=Cost(seconds=4321.5, peak_bytes=98_765_000_000),
            search=Search(seconds=3210.4, bits_per_weight=4.625, held_out_loss=0.01234),
            accuracy=model_row("x", 0.0123).accuracy,
        )
        for index, name in enumerate(("signround", "modelopt-awq_full", "builder-int4"))
    )


def swept() -> TextResults:
    return TextResults(text="offline", base=model_row("base", 0.0), models=measured_models())


def weights() -> RenderableType:
    report = WeightsReport(
        folder=FOLDER, bytes=12_345_600_000, recipe="awq_gptq INT4 block 32", weight_form=WeightForm.MATMUL_NBITS,
        folds_input_scales=True, groups=1234, finished=1200, embeddings=1, bits_per_weight=4.625, sites=(),
        kept=tuple((name, "--exclude experts") for name in SITES), files=("plan.toml", "report.jsonl"),
    )  # fmt: skip
    return weights_table(report, search())


def cache() -> RenderableType:
    report = CacheReport(
        folder=FOLDER, bytes=5_123_456_789, source="cnn", calibration_windows=115, held_out_windows=13, seq_len=2048,
        providers=("CUDAExecutionProvider",), activations=1021, widths=((2880, 512), (5760, 509)), as_rows=12,
        forecasts=1234, files=("sensitivity.json",), damaged=(f"{FOLDER} is damaged",), made_from=str(FOLDER),
    )  # fmt: skip
    return cache_table(report)


def benchmarked() -> list[RenderableType]:
    machine = Machine(processor="AMD EPYC 9554 64-Core Processor", cores=64, threads=64, gpu=None, versions={})
    command = CommandFigure(name="quantize awq_gptq", command="c", seconds=1234.5, peak_bytes=98_765_000_000)
    search = SearchFigure(
        group=KINDS[1], in_features=2880, out_features=5760, algorithm="awq_gptq", seconds=12.34,
        device_peak_bytes=12_345_000_000,
    )  # fmt: skip
    capture = CaptureFigure(tokens=512, plain=653.0, tapped=717.0, observed=468.0, provider="CPUExecutionProvider")
    writing = WriteFigure(bytes=123_000_000_000, export_seconds=352.0, copy_seconds=390.0)
    found = Benchmark(
        machine=machine, base="b", commands=(command,), capture=capture, search=(search,), writing=writing
    )
    return list(benchmark_tables(found))


def checked() -> RenderableType:
    machine = Machine(processor="AMD EPYC", cores=64, threads=64, gpu="NVIDIA RTX 6000 Ada Generation", versions={})
    found = GpuCheck(
        machine=machine,
        size="full",
        placement=Placement(
            provider="CUDAExecutionProvider", outputs="cuda", missing=(("cuda", "torch was installed without CUDA"),)
        ),
        fusion=(
            FusionFigure(
                precision="fp16", options="--block_size 128", formats="4b128z, 8b128", sites=29, fused=29
            ),
        ),
        layers=(
            SearchFigure(
                group=KINDS[1], in_features=14_336, out_features=28_672, algorithm="awq_gptq", seconds=12.34,
                device_peak_bytes=12_345_000_000,
            ),
        ),
        steps=(StepFigure(name="refine of two 8B layers", seconds=123.4, device_peak_bytes=12_345_000_000),),
        wholes=(WholeFigure(name="awq_gptq of Llama-3-8B's shapes", seconds=123.4, aim=90.0, how="32 times each"),),
        same_bits=True,
        speed=evaluation().speed,
        not_done=(("decoding", "240 s were over before it"),),
    )  # fmt: skip
    return check_table(found)


def compared() -> Evaluation:
    found = evaluation()
    rows = [replace(row, name=f"Phi-3.5-MoE-instruct-{row.name}") for row in found.rows]
    return replace(found, rows=tuple(rows))


def peers_speed() -> RenderableType:
    speed = evaluation().speed
    assert speed is not None
    return speed_table(speed)


SCREENS: dict[str, Callable[[], RenderableType | list[RenderableType]]] = {
    "quantization_table": search,
    "preview_table": plan,
    "export_table": exported,
    "calibration_section": calibrated,
    "results_table": lambda: results_table(swept()),
    "means_table": lambda: means_table([swept(), replace(swept(), text="models/domains/encyclopedia.txt")]),
    "sweep_table": lambda: sweep_table(
        SweepReport(folder=FOLDER, texts=(swept(),), failed=1, deleted=("signround-b128-zp",))
    ),
    "weights_table": weights,
    "cache_table": cache,
    "choice_table": lambda: choice_table("cpu@1.32", choose("cpu").explanations),
    "tables_of": lambda: list(tables_of(compared())),
    "tables_of_outputs": lambda: list(tables_of_outputs(outputs_compared())),
    "tables_of_worst": lambda: list(tables_of_worst(compared())),
    "speed_table": peers_speed,
    "benchmark_tables": benchmarked,
    "check_table": checked,
}


def outputs_compared() -> OutputEvaluation:
    score = OutputScore(
        output="image_features", vectors=4096, cosine=0.99931, worst_cosine=0.9812, relative_error=0.0372
    )
    level = "4 (ONNX Runtime's default on the CPU)"
    return OutputEvaluation(
        component="vision",
        source="images in flowers",
        samples=32,
        rows=(
            OutputRow(name="base", bytes=600_000_000, accuracy_level="", scores=()),
            OutputRow(name="int4", bytes=101_500_000, accuracy_level=level, scores=(score,)),
        ),
    )


def printed(screen: RenderableType | list[RenderableType], width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(*(screen if isinstance(screen, list) else [screen]), sep="", crop=False)
    return captured.get()


def tokens(text: str) -> Counter[str]:
    """Count the numbers and the words of a text."""
    return Counter(re.findall(r"\d+(?:[.,]\d+)*(?:e[-+]\d+)?|[A-Za-z]+", text))


def check_whole(screen: RenderableType | list[RenderableType]) -> None:
    """Check that each width shows all that an endless line shows."""
    everything = tokens(printed(screen, WIDE))
    assert len(everything) > 10
    for width in WIDTHS:
        text = printed(screen, width)
        once = "In all rows " in text
        lost = set(everything) - set(tokens(text)) if once else everything - tokens(text)
        assert not lost, f"at {width} columns:\n{text}"
        assert max(map(cell_len, text.splitlines())) <= width, f"at {width} columns:\n{text}"
        assert not [line for line in text.splitlines() if re.fullmatch(r"\s*[A-Za-z]\s*", line)]


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_loses_nothing_at_any_width(name: str) -> None:
    check_whole(SCREENS[name]())


def test_an_inspected_model_loses_nothing_at_any_width(tiny_model: Path) -> None:
    check_whole(inspected(report_model(locate_model(tiny_model))))


def tables_made_elsewhere() -> Iterator[str]:
    """Yield the modules that make rich tables themselves, and the functions whose tables have no screen here."""
    for package in ("stages", "export", "scripts", "genai_quant"):
        for file in sorted((ROOT / package).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            if "from rich.table" in source and file.name != "progress.py":
                yield str(file)
            if "stages.commands.tables" in source and file.name != "help.py":
                made = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
                public = [name for name in made if "table" in name and not name.startswith("_")]
                yield from (f"{file}: {name}" for name in public if name not in {*SCREENS, *NOT_SCREENS})


NOT_SCREENS = {
    "model_table",  # test_an_inspected_model_loses_nothing_at_any_width
    "accuracy_tables", "worst_tables", "answer_tables", "speed_tables", "task_tables", "verified_tables",  # tables_of
    "output_tables",  # tables_of_outputs
}  # fmt: skip


def test_every_table_is_laid_out_by_the_shared_helper_and_tried_here() -> None:
    assert list(tables_made_elsewhere()) == []


def test_a_search_as_people_read_it() -> None:
    lines = printed(search(), 80).splitlines()
    assert lines[:8] == [
        "awq_gptq INT4 block 32 without zero point, INT8 at 8 sites: 24 sites, 5.954 bits",
        "a weight, 1 h 2 min",
        "weights                   format    MB  error by   error      on      with input",
        "                                        rounding      as  unseen           scale",
        "                                                  stored    text",
        "─" * 80,
        "2 x self_attn/k_proj/       4b32  24.7    1.234%  0.573%  0.684%          2 of 2",
        "MatMul_Quant",
    ]
    assert "In all rows range kept: 0.87" in lines
    assert "Format: 4b32 is INT4, a scale for 32 inputs; 8b128 is INT8, a scale for 128" in lines


COLUMNS = (
    Column(heading="name"),
    Column(heading="a note", wraps=True, leaves=1),
    Column(heading="empty", is_number=True),
    Column(heading="MB of all", is_number=True),
)
TABLE = DataTable(
    title="A title",
    columns=COLUMNS,
    rows=(("/model/layers.31/k_proj", "some words", "-", "1,536.5"), (), ("b", "", "", "2")),
)


def test_a_column_without_values_is_left_out_and_others_leave_in_their_order() -> None:
    assert printed(TABLE, 60).splitlines() == [
        "A title",
        "name                     a note      MB of all",
        "──────────────────────────────────────────────",
        "/model/layers.31/k_proj  some words    1,536.5",
        "──────────────────────────────────────────────",
        "b                                            2",
        "",
    ]
    assert printed(TABLE, 36).splitlines() == [
        "A title",
        "name                     MB of all",
        "──────────────────────────────────",
        "/model/layers.31/k_proj    1,536.5",
        "    a note: some words",
        "──────────────────────────────────",
        "b                                2",
        "",
    ]
    assert printed(TABLE, 20).splitlines() == [
        "A title",
        "name",
        "────────────────────",
        "/model/layers.31/",
        "k_proj",
        "    a note: some",
        "    words; MB of",
        "    all: 1,536.5",
        "────────────────────",
        "b",
        "    MB of all: 2",
        "",
    ]
    alike = replace(TABLE, rows=(TABLE.rows[0], TABLE.rows[0]))
    assert printed(alike, 36).splitlines()[-2:] == ["In all rows a note: some words", ""]
    assert TABLE.as_markdown().splitlines() == [
        "| name | a note | MB of all |",
        "| --- | --- | --: |",
        "| /model/layers.31/k_proj | some words | 1,536.5 |",
        "| b |  | 2 |",
    ]


def test_facts_stand_beside_their_names_which_are_said_once() -> None:
    table = FactTable(title="t", facts=(("note", "one [two] three"), ("note", "four"), ("size", "5")))
    assert printed(table, 16).splitlines() == ["t", "note  one [two]", "      three", "      four", "size  5", ""]


def test_words_break_only_where_they_must_and_never_in_a_number() -> None:
    assert wrapped("layers.31/k_proj is 1,536.5 MB", 11) == ["layers.31/", "k_proj is", "1,536.5 MB"]
    assert wrapped("about 1,536.5 MB, 61.0 → 3.0 %", 13) == ["about", "1,536.5 MB,", "61.0 → 3.0 %"]
    assert wrapped("two\nlines", 20) == ["two", "lines"]
    assert wrapped("abcdefgh", 3) == ["abc", "def", "gh"]

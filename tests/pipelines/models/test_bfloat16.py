"""A bfloat16 base the whole way on a machine without a GPU: calibrate, quantize, export, verify, evaluate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import stages.runtime.tap
from stages.calibration.cache import open_cache
from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.progress import progress_bar
from stages.errors import GraphError
from stages.evaluation.compare import compare, prepare
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.partition import cut_into_partitions
from stages.model.sites import find_groups
from stages.report.tables import accuracy_tables
from stages.runtime.cpu.upcast import upcast_file
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import choose_providers
from stages.runtime.session import OpenedSession
from stages.runtime.tap import open_partition_tap, open_value_tap, tapped_model
from tests.support.commands import Commands
from tests.support.written import fused_sites

pytestmark = pytest.mark.slow

TOKENS = np.arange(40).reshape(1, 40) * 7 % 300


@pytest.fixture(scope="module")
def calibrated(tiny_model_bf16: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache."""
    folder = tmp_path_factory.mktemp("caches") / "bf16"
    text = {"dataset": str(tiny_text), "calib_size": 12, "seq_len": 32}
    calibrate(CalibrateConfig(onnx_path=tiny_model_bf16, cache_dir=folder, **text))
    return folder


def logits(folder: Path, scratch: Path) -> np.ndarray:
    directory = locate_model(folder)
    with upcast_file(ir.load(directory.onnx_file), scratch) as path:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = CausalFeeds.of(session, directory)
        return np.asarray(session.run(["logits"], feeds(TOKENS))[0])


def test_calibration_says_that_it_widened_and_leaves_nothing_behind(
    tiny_model_bf16: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    text = ["--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16]
    code, printed = commands.calibrate("--onnx_path", tiny_model_bf16, *text, "--cache_dir", tmp_path / "cache")
    assert code == 0, printed
    assert "as float32: the CPU has no bfloat16 kernels" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_statistics_are_those_of_the_float32_build_of_the_same_numbers(
    calibrated: Path, tiny_model_bf16: Path, tiny_model: Path
) -> None:
    """The float32 base has the numbers before they were rounded to bfloat16: 2^-9 relative each."""
    directory, plain = locate_model(tiny_model_bf16), locate_model(tiny_model)
    groups, plain_groups = find_groups(load_graph(directory)), find_groups(load_graph(plain))
    assert {site.dtype for group in groups for site in group.sites} == {"bfloat16"}
    cache = open_cache(calibrated, fingerprint_model(directory))
    activations = tuple(group.activation for group in plain_groups)
    with open_value_tap(load_graph(plain), plain, activations, choose_providers("cpu"), {}) as tap:
        from safetensors.numpy import load_file

        tokens = load_file(calibrated / "tokens.safetensors")["calibration"]
        rows = dict(tap.run(tokens))
    assert [group.activation for group in groups] == [group.activation for group in plain_groups]
    for group in groups:
        expected = rows[group.activation].reshape(-1, group.in_features).double().abs().mean(dim=0)
        found = cache.read(group.activation).calibration.abs_mean.double()
        assert float((found - expected).abs().max() / expected.max()) < 2e-2


def test_taps_of_a_graph_that_runs_as_it_is_come_out_as_float32(tiny_model_bf16: Path) -> None:
    """On CUDA nothing is widened, and numpy has no bfloat16 to hold an output in."""
    model = load_graph(locate_model(tiny_model_bf16))
    activations = tuple(group.activation for group in find_groups(model))
    tapped = tapped_model(model, activations)
    assert [output.dtype for output in tapped.graph.outputs] == [ir.DataType.FLOAT] * len(activations)
    assert [output.producer().inputs[0].name for output in tapped.graph.outputs] == list(activations)
    assert any(value.dtype == ir.DataType.BFLOAT16 for value in tapped.graph.inputs)


def test_what_a_bfloat16_piece_is_fed_by_numpy_comes_in_as_float32(tiny_model_bf16: Path) -> None:
    """Between two pieces on CUDA: out through a Cast, and in through another."""
    directory = locate_model(tiny_model_bf16)
    model = load_graph(directory)
    activations = [group.activation for group in find_groups(model)]
    partition = list(cut_into_partitions(model, wanted=activations, limit=1))[-1]
    carried = {name: np.dtype(np.float32) for name in partition.boundary_inputs}
    narrow = [value.name for value in partition.model.graph.inputs if value.dtype == ir.DataType.BFLOAT16]
    fed = {name for name in narrow if name in carried}
    assert fed
    opened: list[ir.Model] = []

    def keep(tapped: ir.Model, *_: object) -> OpenedSession:
        opened.append(tapped)
        raise GraphError("seen enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.runtime.tap, "open_graph", keep)
        with pytest.raises(GraphError, match="seen enough"):
            open_partition_tap(partition, directory, choose_providers("cpu"), {}, None, carried)
    (tapped,) = opened
    inputs = {value.name: value for value in tapped.graph.inputs}
    for name in fed:
        assert inputs[f"{name}/float32"].dtype == ir.DataType.FLOAT
        (cast,) = inputs[f"{name}/float32"].consumers()
        assert (cast.op_type, cast.outputs[0].name, cast.outputs[0].dtype) == ("Cast", name, ir.DataType.BFLOAT16)
        assert next(iter(tapped.graph)).op_type == "Cast"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], marks=pytest.mark.thorough),
        ["--use_zero_point", "--enable_mixed_quant"],
        pytest.param(["--lm_head", 4], marks=pytest.mark.thorough),
        pytest.param(["--awqlite_disable_fuse_nodes"], marks=pytest.mark.thorough),
    ],
)
def test_a_bfloat16_base_becomes_matmul_nbits_that_stays_near_it(
    arguments: list[object],
    calibrated: Path,
    tiny_model_bf16: Path,
    tmp_path: Path,
    commands: Commands,
) -> None:
    output = tmp_path / "int4"
    code, printed = commands.quantize(
        "--onnx_path", tiny_model_bf16, "--output_path", output, "--cache_dir", calibrated, "--block_size", 16,
        *arguments,
    )  # fmt: skip
    assert code == 0, printed
    sites = 11 if "--lm_head" in arguments else 10
    assert fused_sites(output) == (sites, sites)
    assert "as float32: the CPU has no bfloat16 kernels" in printed
    assert "not checked" not in printed
    model = ir.load(output / "model.onnx")
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert {value.dtype for node in nodes for value in node.inputs[2:3] if value} == {ir.DataType.BFLOAT16}
    assert len(nodes) == sites
    base, ours = logits(tiny_model_bf16, tmp_path), logits(output, tmp_path)
    # Five percent of weight error a layer; a broken fold or transposed code gives more than 1.
    assert np.linalg.norm(ours - base) / np.linalg.norm(base) < 0.4
    assert {path.name for path in output.iterdir() if path.name.startswith("model")} == {
        "model.onnx",
        "model.onnx.data",
    }


def test_dq_is_written_when_asked_for_and_nothing_is_said_to_fuse_it(
    tiny_model_bf16: Path, tmp_path: Path, commands: Commands
) -> None:
    outputs = {}
    for form in ("dq", "matmul_nbits"):
        code, printed = commands.quantize(
            "--onnx_path", tiny_model_bf16, "--output_path", tmp_path / form, "--algo", "rtn_dq", "--block_size", 16,
            "--weight_operator", form,
        )  # fmt: skip
        assert code == 0, printed
        fused = 0 if form == "dq" else 10
        assert fused_sites(tmp_path / form) == (fused, 10)
        assert ("scales are bfloat16, which ONNX Runtime fuses nowhere" in printed) == (form == "dq")
        outputs[form] = logits(tmp_path / form, tmp_path)
    counts = Counter(node.op_type for node in ir.load(tmp_path / "dq" / "model.onnx").graph)
    assert (counts["DequantizeLinear"], counts["MatMulNBits"]) == (10, 0)
    # Widened, the CPU fuses DQ too, and then rounds activations to int8: half a percent a layer.
    difference = np.linalg.norm(outputs["dq"] - outputs["matmul_nbits"]) / np.linalg.norm(outputs["dq"])
    assert difference < 0.05


def test_an_embedding_is_looked_up_and_compared(tiny_model_bf16: Path, tmp_path: Path, commands: Commands) -> None:
    code, printed = commands.quantize(
        "--onnx_path", tiny_model_bf16, "--output_path", tmp_path / "out", "--algo", "rtn_dq", "--block_size", 16,
        "--gather_quantize_axis", 1,
    )  # fmt: skip
    assert code == 0, printed
    assert "lookups" in printed


def test_evaluation_runs_bfloat16_models_and_says_how(tiny_model_bf16: Path, tiny_model: Path, tiny_text: Path) -> None:
    config = EvaluateConfig(
        base=tiny_model, model=(tiny_model_bf16, tiny_model_bf16), text=str(tiny_text), windows=2, seq_len=48
    )
    report = compare(prepare(config), progress_bar())
    plain, rounded, again = report.rows
    assert [row.widened for row in report.rows] == [False, True, True]
    assert rounded.accuracy == again.accuracy
    # bfloat16 rounds weights by 2^-9; a divergence is of the order of the squared change of logits.
    assert 0 < rounded.accuracy.mean_divergence < 1e-2
    assert rounded.bytes < 0.7 * plain.bytes
    text = accuracy_tables([report]).text
    assert "tiny-bf16, tiny-bf16 ran as float32" in text


def test_every_stored_scale_is_a_bfloat16_number(tiny_model_bf16: Path, tmp_path: Path, commands: Commands) -> None:
    code, printed = commands.quantize(
        "--onnx_path", tiny_model_bf16, "--output_path", tmp_path / "out", "--algo", "rtn_dq", "--block_size", 16
    )
    assert code == 0, printed
    initializers = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    scales = [value.const_value.numpy() for name, value in initializers.items() if name.endswith("/scales")]
    assert len(scales) == 10
    assert {array.dtype for array in scales} == {np.dtype(ml_dtypes.bfloat16)}

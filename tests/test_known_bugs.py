"""One test for each proven bug of the tool that this one replaces: ours is right, and theirs fails the same assertion.

What theirs computes stands in tests/reference/competitor.py. A full-size test of the same matter often lies beside the
code; here is the one case that shows the bug.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx import TensorProto, numpy_helper
from torch.utils._python_dispatch import TorchDispatchMode

from export.rewrite import rewrite
from stages.base_graph import load_graph
from stages.calibrate import calibrate
from stages.config import CalibrateConfig
from stages.errors import RecipeError
from stages.graph.embeddings import find_embeddings
from stages.graph.run import tapped_model
from stages.graph.sites import MatMulSite, find_groups
from stages.graph.weights import read_weight
from stages.model_directory import locate_model
from stages.observe.dataset import WindowRequest, load_windows
from stages.observe.statistics import StatisticsAccumulator, StatisticsSize
from stages.quantized_store import open_store
from stages.records import PerBlock, PerChannel, QuantSpec, WeightForm
from stages.screen import silent_screen
from stages.session import CausalFeeds, SessionSettings, open_session
from stages.solve.affine import choose_parameters, quantize, round_trip
from stages.solve.awq import awq_lite, input_scale_candidates, rank_input_scales, weight_magnitude
from stages.solve.blocks import join, split
from stages.solve.clip import clip_sites
from stages.solve.embedding import plan_embeddings
from stages.solve.evaluate import full_range, full_ranges
from stages.solve.objective import gram_blocks, output_error
from stages.solve.problem import IDENTITY, GroupProblem, InputScale
from stages.solve.ranges import clip_ratio_grid, search_clip_ratios
from tests.commands import Commands
from tests.export.builders import quantized_matmul, relative_difference, run
from tests.graphs import MICROSOFT, TinyGraph, tiny_decoder
from tests.reference import competitor
from tests.reference.rounding import round_trip as reference_round_trip
from tests.reference.search import output_loss
from tests.reference.search import weight_magnitude as reference_magnitude
from tests.scaled_rewrite import INT8_ERROR, filled_store, known_scale, scaled_rewrite
from tests.solve.problems import (
    OPTIONS,
    gram_stats,
    joint_error,
    random_layer,
    row_stats,
    solver_of,
    spec,
    stored_weight,
)

RATIOS = clip_ratio_grid(0.5, 0.05)
CPU = torch.device("cpu")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


# --------------------------------------------------------------------------- a decoder small enough for every command


def decoder_graph(up_width: int = 96, dtype: type = np.float32) -> TinyGraph:
    """tests.graphs.tiny_decoder behind a norm whose gain makes some channels loud, so that AWQ has something to do."""
    rng = np.random.default_rng(0)
    graph = tiny_decoder(noise(rng, 64, up_width).astype(dtype), noise(rng, up_width, 64).astype(dtype), rng)
    loud = np.exp(1.5 * rng.standard_normal(64)).astype(dtype)
    graph.initializers = [
        numpy_helper.from_array(loud, "gain") if tensor.name == "gain" else tensor for tensor in graph.initializers
    ]
    return graph


def saved_decoder(folder: Path, graph: TinyGraph) -> Path:
    graph.save(folder)
    config = {"model": {"vocab_size": 32, "decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def calibrate_at_random(base: Path, calib_size: int = 20) -> None:
    calibrate(
        CalibrateConfig(onnx_path=base, use_random_calib=True, calib_size=calib_size, seq_len=16), silent_screen()
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved decoder with its calibration cache beside it."""
    base = saved_decoder(tmp_path_factory.mktemp("decoder") / "base", decoder_graph())
    calibrate_at_random(base)
    return base


def quantize_decoder(commands: Commands, base: Path, output: Path, *arguments: object) -> None:
    code, printed = commands.quantize(
        "--onnx_path", base, "--output_path", output, "--block_size", 16, "--verify", "off", *arguments
    )
    assert code == 0, printed


def initializer(folder: Path, name: str) -> np.ndarray:
    value = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert value is not None
    return np.asarray(value.numpy())


# --------------------------------------------------------------------------- the searches


def test_b01_norms_take_input_scales_without_cupy(
    decoder: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """awq_lite stops at the first fusible norm on machines without CuPy: it calls .get() on a NumPy array."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    quantize_decoder(commands, decoder, tmp_path / "int4", "--algo", "awq_lite")
    store = open_store(tmp_path / "int4.weights")
    scale = next(
        store.read(index, site).input_scale
        for index, group in enumerate(store.recipe.groups)
        for site in group.sites
        if site.name == "up/MatMul"
    )
    assert scale is not None
    gain = initializer(decoder, "gain")
    np.testing.assert_array_equal(initializer(tmp_path / "int4", "gain/divided"), gain / scale.numpy())
    with pytest.raises(AttributeError, match="get"):
        competitor.fused_initializer(gain, scale.numpy())


def test_b02_rounding_writes_a_graph_that_the_runtime_accepts(
    decoder: Path, tmp_path: Path, commands: Commands
) -> None:
    """Block-wise rtn writes QuantizeLinear and DequantizeLinear without axis and block_size, which no runtime takes."""
    quantize_decoder(commands, decoder, tmp_path / "int4", "--algo", "rtn")
    model = onnx.load(tmp_path / "int4/model.onnx", load_external_data=False)
    feeds = {"input_ids": np.arange(32)[None]}

    def logits(written: onnx.ModelProto) -> np.ndarray:
        settings = SessionSettings(external_data_folder=tmp_path / "int4")
        return np.asarray(open_session(written.SerializeToString(), settings).run(None, feeds)[0])

    base = open_session(decoder / "model.onnx", SessionSettings()).run(None, feeds)[0]
    # INT4 with two layers after one another; anything but these weights is about 1 away.
    assert np.linalg.norm(logits(model) - base) < 0.3 * np.linalg.norm(base)
    with pytest.raises(Exception, match="scale must be"):
        logits(competitor.without_block_attributes(model))


def test_b03_alpha_step_is_honoured(decoder: Path, tmp_path: Path, commands: Commands) -> None:
    """The default search of the competitor always takes steps of 0.1, whatever awqlite_alpha_step says."""

    def alphas(step: float) -> set[float]:
        output = tmp_path / f"step{step}"
        quantize_decoder(commands, decoder, output, "--algo", "awq_lite", "--awqlite_alpha_step", step)
        lines = (output.with_suffix(output.suffix + ".weights") / "report.jsonl").read_text().splitlines()
        return {report["alpha"] for report in map(json.loads, lines)} - {None}

    def on_grid(found: set[float], step: float) -> bool:
        return all(alpha / step == pytest.approx(round(alpha / step)) for alpha in found)

    ours = alphas(0.25)
    assert ours
    assert on_grid(ours, 0.25)
    assert not on_grid(alphas(0.1), 0.25)
    layer = random_layer(0)
    theirs = {
        competitor.search_input_scale(layer.tokens.numpy(), weight.numpy().T, 16, alpha_step=0.25).alpha
        for weight in layer.problem.weights
    }
    assert not on_grid(theirs, 0.25)


def test_b04_plain_rounding_is_a_candidate() -> None:
    """No alpha of the competitor's grid stands for plain rounding, so its choice may be worse than that."""
    # Weights that rounding keeps exactly: codes from -7 to 7 times a power of two, 7 in every block.
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(0)
    weight = torch.randint(-7, 8, (20, 48), generator=generator).float() / 8
    weight[:, ::16] = 7 / 8
    problem = replace(layer.problem, weights=(weight,))
    assert problem.stats is not None
    assert rank_input_scales(problem, OPTIONS)[0] is IDENTITY
    chosen = awq_lite(problem, OPTIONS)
    assert joint_error(problem, chosen, problem.stats.calibration) == 0
    tokens, theirs = layer.tokens.numpy(), weight.numpy().T
    assert np.array_equal(competitor.round_trip(theirs, 16), theirs)
    assert competitor.search_input_scale(tokens, theirs, 16).loss > 0


def test_b05_siblings_are_searched_at_the_scale_that_they_share() -> None:
    """The competitor averages the scales that q, k and v found alone and never looks at the loss of the average."""
    # Single layers can be lucky with the mean; over twenty of them the joint search must win on text it never saw.
    joint, averaged = 0.0, 0.0
    for seed in range(20):
        problem = random_layer(seed, widths=(12, 12)).problem
        alone = [rank_input_scales(single, OPTIONS)[0] for single in each_alone(problem)]
        found = [np.ones(48) if one.scale is None else one.scale.numpy() for one in alone]
        mean = torch.from_numpy(competitor.shared_scale(found)).float()
        joint += relative_held_out_error(problem, rank_input_scales(problem, OPTIONS)[0])
        averaged += relative_held_out_error(problem, InputScale(family="mean", alpha=None, scale=mean))
    assert joint < averaged


def each_alone(problem: GroupProblem) -> Iterator[GroupProblem]:
    for site, weight, number in zip(problem.group.sites, problem.weights, problem.specs, strict=True):
        yield replace(problem, group=replace(problem.group, sites=(site,)), weights=(weight,), specs=(number,))


def relative_held_out_error(problem: GroupProblem, scale: InputScale) -> float:
    assert problem.stats is not None
    plain, scaled = (full_ranges(problem, "full", which) for which in (IDENTITY, scale))
    stats = problem.stats.held_out
    return joint_error(problem, scaled, stats) / joint_error(problem, plain, stats)


def test_b06_importance_is_relative_to_the_block_that_shares_a_scale() -> None:
    """The competitor's groups are strided by K / B: channel 0 is compared with 2, 4 and 6, not with 1, 2 and 3."""
    weight = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1.0, 1, 1, 1, 100, 100, 100, 100])
    exact = reference_magnitude(weight.double().numpy(), 4)
    np.testing.assert_allclose(weight_magnitude((weight,), (spec(block_size=4),)).numpy(), exact, rtol=1e-6)
    assert np.abs(competitor.weight_importance(weight.numpy().T, 4) - exact).max() > 0.1
    # And so the scales themselves: a^r / w^(1-r), its largest and smallest value with product 1.
    layer = random_layer(8, in_features=48)
    assert layer.problem.stats is not None
    a = layer.tokens.double().abs().mean(0).numpy()
    w = reference_magnitude(layer.problem.weights[0].double().numpy(), 16)
    candidates = input_scale_candidates(layer.problem, layer.problem.stats.calibration, 0.1)
    for candidate in (one for one in candidates if one.family == "duo"):
        assert candidate.alpha is not None
        assert candidate.scale is not None
        scale = a**candidate.alpha / w ** (1 - candidate.alpha)
        scale /= np.sqrt(scale.max() * scale.min())
        np.testing.assert_allclose(candidate.scale.numpy(), scale, rtol=1e-5)


def test_b07_clip_ratios_of_scaled_weights_meet_scaled_activations() -> None:
    """awq_full clips the scaled weight against the unscaled activation: channel k counts s_k^2 times too much."""
    layer = random_layer(12)
    assert layer.problem.stats is not None
    weight, stats = layer.problem.weights[0], layer.problem.stats.calibration
    scale = torch.rand(48, generator=torch.Generator().manual_seed(3)) * 4 + 0.2
    plain = full_range(weight, spec(), "full", InputScale(family="test", alpha=None, scale=scale))
    (choice,) = clip_sites(layer.problem, OPTIONS, (plain,))
    ours = choice.parameters.scales / plain.parameters.scales
    theirs = search_clip_ratios(weight * scale, spec(), "full", gram_blocks(stats, 16), RATIOS)
    right, wrong = (held_out_loss(layer.held_out, weight, scale, ratios) for ratios in (ours, theirs))
    assert right < wrong


def held_out_loss(held_out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ratios: torch.Tensor) -> float:
    """Output error of diag(s) W, clipped by ``ratios``, on tokens that no search saw."""
    stored = reference_round_trip((weight * scale).numpy(), 16, 4, symmetric=True, ratios=ratios.numpy())
    return output_loss(held_out.numpy(), stored / scale.numpy() - weight.numpy())


def test_b08_every_token_counts() -> None:
    """The competitor's clip search sees 64 tokens, a stride apart that divides 512: of 128 samples only the first."""
    length, samples, in_features = 512, 128, 32
    positions = competitor.sampled_rows(samples * length) % length
    assert (positions == 0).all()
    assert (competitor.sampled_rows(32 * length) % length == 0).mean() == 0.5
    # First tokens excite few channels, and loudly, as they do in language models.
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(samples + 1, length, in_features, generator=generator)
    windows[:, 0] *= 0.01
    windows[:, 0, ::16] = 20
    accumulator = StatisticsAccumulator(
        "x", StatisticsSize(in_features=in_features, tokens=samples * length, itemsize=4), CPU
    )
    for window in windows[:-1]:
        accumulator.add(window[None])
    stats, tokens = accumulator.finish(), windows[:-1].reshape(-1, in_features)
    assert stats.num_tokens == len(tokens)
    assert stats.gram is not None
    exact = tokens.double().T @ tokens.double() / len(tokens)
    # float32 sums of 65536 products in 128 parts.
    torch.testing.assert_close(stats.gram.double(), exact, rtol=1e-4, atol=1e-4)
    weight, ones = torch.randn(24, in_features, generator=generator), torch.ones(in_features)
    sampled = gram_stats(tokens[competitor.sampled_rows(len(tokens))])
    losses = []
    for seen in (stats, sampled):
        ratios = search_clip_ratios(weight, spec(), "full", gram_blocks(seen, 16), RATIOS)
        losses.append(held_out_loss(windows[-1], weight, ones, ratios))
    assert losses[0] < losses[1]


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.9), (0.5, 0.5), (-0.9, -0.3)])
def test_b09_blocks_of_one_sign_keep_their_values(low: float, high: float) -> None:
    """The competitor's asymmetric range need not hold 0 and its zero point is cut off: a block of 0.5 becomes 1e-5."""
    block = torch.linspace(low, high, 16)
    parameters = choose_parameters(block[None, None], spec(symmetric=False))
    ours = round_trip(block[None, None], parameters, spec(symmetric=False)).flatten()
    # Half a step, and float32 rounding.
    limit = 0.5 * max(abs(low), abs(high)) / 15 + 1e-6
    assert float((ours - block).abs().max()) <= limit
    assert np.abs(competitor.asymmetric_round_trip(block.double().numpy()) - block.numpy()).max() > limit


def test_b10_codes_from_128_on_survive() -> None:
    """With INT8 and zero points the competitor's unsigned codes go through int8: 200 becomes -56."""
    layer = random_layer(10)
    problem = replace(layer.problem, specs=(spec(symmetric=False, bits=8),))
    (stored,) = solver_of(problem, "awq_lite").solve(problem.group).weights
    assert stored.codes.dtype == torch.uint8
    assert int(stored.codes.max()) > 200

    def error(codes: torch.Tensor) -> float:
        difference = stored_weight(replace(stored, codes=codes)) - problem.weights[0]
        return float(difference.norm() / problem.weights[0].norm())

    # Half of 1/255 of a block's range, which is about four standard deviations.
    assert error(stored.codes) < 0.01
    assert error(torch.from_numpy(competitor.stored_codes(stored.codes.numpy()))) > 0.5


# --------------------------------------------------------------------------- stored forms


def test_b11_zero_points_have_the_shape_of_their_scales(tmp_path: Path) -> None:
    """Per channel, the competitor's scales are [N] and its zero points still [1, N]."""
    model, x, expected = quantized_matmul(tmp_path, (64, 48), 8, False, PerChannel(), "float32", WeightForm.DQ)
    shapes = {name.rpartition("/")[2]: list(value.shape) for name, value in model.graph.initializers.items()}
    assert shapes["scales"] == shapes["zero_points"] == [48]
    (y,) = run(model, {"x": x})
    assert relative_difference(y, expected) < 1e-5  # sums of 64 products in float32
    theirs = competitor.with_row_zero_points(ir.to_proto(model), "y/MatMul/zero_points")
    with pytest.raises(Exception, match="zero"):
        run(ir.from_proto(theirs), {"x": x}, optimize=False)


@pytest.mark.parametrize("shape", [(64, 64), (64, 48)])
def test_b12_column_major_int8_has_its_channels_on_axis_0(tmp_path: Path, shape: tuple[int, int]) -> None:
    """In column-major form the competitor's INT8 keeps axis 1: an error where N != K, silently wrong where N = K."""
    form = WeightForm.DQ_COLUMN_MAJOR
    model, x, expected = quantized_matmul(tmp_path, shape, 8, True, PerChannel(), "float32", form)
    (y,) = run(model, {"x": x})
    assert relative_difference(y, expected) < 1e-5  # sums of 64 products in float32
    theirs = ir.from_proto(competitor.with_channel_axis_1(ir.to_proto(model)))
    if shape[0] == shape[1]:
        assert relative_difference(run(theirs, {"x": x})[0], expected) > 0.1
    else:
        with pytest.raises(Exception, match="DequantizeLinear"):
            run(theirs, {"x": x}, optimize=False)


@pytest.mark.parametrize("shape", [(64, 48), (64, 64)])
def test_b13_blocks_of_a_transposed_gemm_run_along_its_inputs(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    """For Gemm with transB the competitor's axis and scales disagree, and its rtn cuts blocks along the outputs."""
    in_features, out_features = shape
    # Neighbouring output channels of very different size: only blocks along the inputs keep the quiet ones.
    weight = (
        noise(rng, out_features, in_features) * (10.0 ** -(np.arange(out_features) % 4)).astype(np.float32)[:, None]
    )
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", in_features])
    graph.node("Gemm", ["x", graph.constant("w", weight)], ["y"], {"transB": 1})
    graph.output("y", TensorProto.FLOAT, ["t", out_features])
    x = rng.standard_normal((32, in_features)).astype(np.float32)

    def worst_channel(found: np.ndarray) -> float:
        exact = x @ weight.T
        return float((np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)).max())

    (y,) = run(scaled_rewrite(tmp_path / "weights", graph.model()).model, {"x": x})
    assert worst_channel(y) < INT8_ERROR
    assert worst_channel(x @ competitor.round_trip(weight, 16, bits=8).T) > INT8_ERROR
    with pytest.raises(Exception, match="DequantizeLinear"):
        run(ir.from_proto(competitor.transposed_gemm(weight, 16)), {"x": x}, optimize=False)


# --------------------------------------------------------------------------- folding and sharing


def test_b14_a_scale_folded_into_a_quantized_layer_is_kept(tmp_path: Path, tiny_model: Path) -> None:
    """The competitor fuses 1 / s into a parent's floating-point weight when its codes are made already: s is lost."""
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    ir.external_data.load_to_model(model)
    session = open_session(directory.onnx_file, SessionSettings())
    feeds = CausalFeeds(session, directory.kv_heads, directory.head_size)(np.arange(40)[None] * 7 % 300)
    result = scaled_rewrite(tmp_path / "weights", model, exclude="lm_head")
    # up_proj and v_proj (inside the packed qkv) are quantized themselves and take the scales of down_proj and o_proj.
    assert [fold.how for fold in result.folds] == ["norm", "value", "norm", "linear"] * 2
    assert relative_difference(run(result.model, feeds)[0], run(model, feeds)[0]) < 2 * INT8_ERROR

    rng = np.random.default_rng(0)
    x, gate, up, down = (noise(rng, *shape) for shape in ((8, 64), (8, 96), (64, 96), (96, 64)))
    scale = known_scale(96).numpy()
    theirs = competitor.gated_output_of_a_late_fold(x, gate, up, down, scale, 16)
    assert relative_difference(theirs, (gate * (x @ up)) @ down) > 2 * INT8_ERROR


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A node "x/..." with initializers, before the MatMul "y" with the weight "y.weight"."""

    graph: TinyGraph
    node: str
    feeds: dict[str, np.ndarray]


def normed_twice(rng: np.random.Generator) -> Parent:
    """Skip norm with a bias of its own and one of the skip, whose sum goes on."""
    graph = TinyGraph()
    feeds = {name: noise(rng, 5, 32) for name in ("h", "skip")}
    inputs = [graph.input(name, TensorProto.FLOAT, [1, 5, 32]) for name in feeds]
    inputs += [graph.constant(name, 1 + noise(rng, 32)) for name in ("gain", "beta", "skip_bias")]
    graph.node("SkipLayerNormalization", inputs, ["x", "", "", "sum"], domain=MICROSOFT)
    graph.output("sum", TensorProto.FLOAT, [1, 5, 32])
    return Parent(graph=graph, node="x/SkipLayerNormalization", feeds={name: x[None] for name, x in feeds.items()})


def gemm_with_bias(rng: np.random.Generator) -> Parent:
    graph = TinyGraph()
    inputs = [graph.input("h", TensorProto.FLOAT, [5, 48])]
    inputs += [graph.constant("w", noise(rng, 48, 32)), graph.constant("bias", noise(rng, 32))]
    graph.node("Gemm", inputs, ["x"])
    return Parent(graph=graph, node="x/Gemm", feeds={"h": noise(rng, 5, 48)})


def scalar_factor(rng: np.random.Generator) -> Parent:
    graph = TinyGraph()
    graph.input("h", TensorProto.FLOAT, [5, 32])
    graph.node("Mul", ["h", graph.constant("half", np.array(0.5, np.float32))], ["x"])
    return Parent(graph=graph, node="x/Mul", feeds={"h": noise(rng, 5, 32)})


def shared_gain(rng: np.random.Generator) -> Parent:
    """A second norm reads the same gain."""
    graph = TinyGraph()
    graph.input("h", TensorProto.FLOAT, [1, 5, 32])
    graph.constant("gain", 1 + noise(rng, 32))
    for output in ("x", "other"):
        graph.node("SimplifiedLayerNormalization", ["h", "gain"], [output])
    graph.output("other", TensorProto.FLOAT, [1, 5, 32])
    return Parent(graph=graph, node="x/SimplifiedLayerNormalization", feeds={"h": noise(rng, 5, 32)[None]})


@pytest.mark.parametrize(
    ("make", "how", "theirs"),
    [
        (normed_twice, "norm", KeyError),
        (gemm_with_bias, "mul", KeyError),
        (scalar_factor, "mul", ValueError),
        (shared_gain, "norm", AssertionError),
    ],
)
def test_b15_only_what_may_be_divided_is_divided(
    make: Callable[[np.random.Generator], Parent],
    how: str,
    theirs: type[Exception],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    """The competitor divides all initializers of the parent, skip bias and shared gain too, and stops at the second."""
    parent = make(rng)
    weight = noise(rng, 32, 48)
    parent.graph.linear("x", weight, "y")
    parent.graph.output("y", TensorProto.FLOAT, [*parent.feeds["h"].shape[:-1], 48])
    base = parent.graph.model()
    before = run(base, parent.feeds)

    def check(model: ir.Model) -> None:
        for name, found, expected in zip(base.graph.outputs, run(model, parent.feeds), before, strict=True):
            assert relative_difference(found, expected) < INT8_ERROR, name

    result = scaled_rewrite(tmp_path / "weights", base)
    check(result.model)
    assert result.folds[-1].how == how
    scale = known_scale(32).numpy()
    fused = parent.graph.proto()
    scaled = next(tensor for tensor in fused.graph.initializer if tensor.name == "y.weight")
    scaled.CopyFrom(numpy_helper.from_array(weight * scale[:, None], "y.weight"))
    with pytest.raises(theirs):
        check(fused_by_competitor(fused, parent.node, scale))


def fused_by_competitor(model: onnx.ModelProto, node: str, scale: np.ndarray) -> ir.Model:
    competitor.fuse_into_parent(model, node, ["y.weight"], scale)
    return ir.from_proto(model)


def test_b16_other_readers_of_a_weight_keep_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """The competitor gives the scaled, quantized weight to every reader: tied embeddings and excluded nodes as well."""
    graph = decoder_graph()
    graph.node("MatMul", ["h", "up.weight"], ["kept"])
    for name, width in (("h", 64), ("kept", 96)):
        graph.output(name, TensorProto.FLOAT, ["batch", "length", width])
    names = [output.name for output in graph.outputs]
    feeds = {"input_ids": np.arange(32)[None]}
    before = dict(zip(names, run(graph.model(), feeds), strict=True))
    ours = run(scaled_rewrite(tmp_path / "weights", graph.model(), exclude="kept").model, feeds)
    after = dict(zip(names, ours, strict=True))
    # The embedding's tokens and the excluded product bit for bit; up and lm_head, which share these weights, are INT8.
    for name in ("h", "kept"):
        np.testing.assert_array_equal(after[name], before[name])
    assert relative_difference(after["logits"], before["logits"]) < INT8_ERROR
    for weight, victim in (("embedding", "h"), ("up.weight", "kept")):
        proto = graph.proto()
        original = next(numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == weight)
        quantized = competitor.round_trip(original * known_scale(len(original)).numpy()[:, None], 16, bits=8)
        proto.graph.initializer.append(numpy_helper.from_array(quantized, "quantized"))
        competitor.rewire_every_consumer(proto, weight, "quantized")
        theirs = dict(zip(names, run(ir.from_proto(proto), feeds), strict=True))
        assert relative_difference(theirs[victim], before[victim]) > 0.1


# --------------------------------------------------------------------------- number types


@pytest.mark.parametrize("difference", [300.0, 1e-4])
def test_b17_losses_of_float16_models_neither_overflow_nor_vanish(difference: float) -> None:
    """The competitor squares differences in float16: 300 squared is infinite, 1e-4 squared is 0."""
    rows = torch.ones(4, 1).half()
    for stats in (gram_stats(rows.float()), row_stats(rows)):
        error = output_error(torch.tensor([[difference]]), stats)
        assert error.dtype == torch.float32
        assert float(error) == pytest.approx(difference**2, rel=1e-6)
    theirs = competitor.loss_in_the_weights_type(np.full(4, difference, np.float16), np.zeros(4, np.float16))
    assert float(theirs) != pytest.approx(difference**2, rel=0.5)


@dataclass
class MatMulTypes(TorchDispatchMode):
    """Notes the number types of all matrix products that torch computes."""

    seen: set[torch.dtype] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"):
            self.seen |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[MatMulTypes]:
    """Number types of all matrix products, those in worker threads among them."""
    found = MatMulTypes()

    class WatchedPool(ThreadPoolExecutor):
        def submit(self, work: Any, *arguments: Any) -> Any:
            def watched() -> Any:
                with MatMulTypes(found.seen):
                    return work(*arguments)

            return super().submit(watched)

    with found, monkeypatch.context() as patch:
        patch.setattr("stages.threads.ThreadPoolExecutor", WatchedPool)
        yield found


@pytest.mark.parametrize("windows", [20, 2])
def test_b18_no_product_is_computed_in_half_precision(
    windows: int, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every float16 product of the competitor's search runs without BLAS on a CPU, a hundred times slower."""
    wide = {torch.float32, torch.float64}
    base = saved_decoder(tmp_path / "base", decoder_graph(dtype=np.float16))
    # 288 tokens make Gram matrices; 16 are fewer than the channels, and are kept as they are, in float16.
    with watched_products(monkeypatch) as calibration:
        calibrate_at_random(base, windows)
    with watched_products(monkeypatch) as search:
        steps = ["--awqlite_alpha_step", 0.5, "--awqclip_alpha_step", 0.25]
        quantize_decoder(commands, base, tmp_path / "int4", "--algo", "awq_full", *steps)
    assert calibration.seen <= wide
    assert bool(calibration.seen) == (windows == 20)
    assert search.seen
    assert search.seen <= wide
    theirs = competitor.output_in_the_weights_type(np.ones((4, 8), np.float16), np.ones((8, 2), np.float16))
    assert torch.from_numpy(theirs).dtype not in wide


@pytest.mark.parametrize("bits", [4, 8])
def test_b19_codes_fit_the_scale_that_is_stored(bits: int, rng: np.random.Generator) -> None:
    """The competitor rounds scales to float16 after choosing the codes, which are then not the nearest any more."""
    weight = noise(rng, 64, 512)  # theirs, [K, N]

    def all_nearest(codes: np.ndarray, scales: np.ndarray) -> bool:
        """No other code is nearer to its weight by more than float32 rounding of the quotient."""
        steps = np.repeat(scales.astype(np.float64), 16, axis=0)
        quotient = np.clip(weight / steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return bool((np.abs(codes - quotient) <= 0.5 + 1e-5).all())

    number = QuantSpec(bits=bits, symmetric=True, granularity=PerBlock(block_size=16), scale_dtype="float16")
    blocks = split(torch.from_numpy(weight.T.copy()), 16)
    parameters = choose_parameters(blocks, number, "compat7")
    assert torch.equal(parameters.scales, parameters.scales.half().float())
    codes = join(quantize(blocks, parameters, number), 64)
    assert all_nearest(codes.numpy().T, parameters.scales.numpy().T)
    assert not all_nearest(*competitor.codes_before_the_scale_is_stored(weight, 16, bits))


# --------------------------------------------------------------------------- graphs and files


def test_b20_a_model_whose_lookups_do_not_qualify_is_answered_in_words() -> None:
    """With no Gather to quantize, the competitor reads a variable that was never set."""
    graph = TinyGraph()
    graph.input("position_ids", TensorProto.INT64, ["batch", "length"])
    graph.node("Gather", [graph.constant("cos_cache", np.ones((8, 16), np.float32)), "position_ids"], ["cos"])
    graph.output("cos", TensorProto.FLOAT, ["batch", "length", 16])
    tables = find_embeddings(graph.model())
    with pytest.raises(RecipeError, match=r"--gather_quantize_axis: no Gather .* leave the option out"):
        plan_embeddings(tables, axis=1, block_size=32, form="dq")
    with pytest.raises(UnboundLocalError, match="block_size"):
        competitor.gather_block_size({table.weight: table.hidden for table in tables})


def calls_of(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, ``action`` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def tower(layers: int) -> ir.Model:
    """Norms and MatMuls after one another."""
    graph = TinyGraph()
    x = graph.input("x", TensorProto.FLOAT, ["t", 16])
    for layer in range(layers):
        gain = graph.constant(f"gain{layer}", np.ones(16, np.float32))
        normed = graph.node("SimplifiedLayerNormalization", [x, gain], [f"n{layer}"])
        x = graph.linear(normed, np.eye(16, dtype=np.float32), f"y{layer}")
    graph.output(x, TensorProto.FLOAT, ["t", 16])
    return graph.model()


def test_b21_the_graph_edit_is_linear_in_the_layers(tmp_path: Path) -> None:
    """For every weight the competitor walks over all nodes: four times the layers are sixteen times the work."""

    def growth(count: Callable[[int], int]) -> float:
        count(2)  # what is done once and remembered
        return count(200) / count(50)

    def ours(layers: int) -> int:
        model = tower(layers)
        store = filled_store(tmp_path / str(layers), model)
        return calls_of(lambda: (find_groups(model), rewrite(model, store)))

    def theirs(layers: int) -> int:
        nodes = [f"y{layer}" for layer in range(layers)]
        return calls_of(lambda: competitor.rewire_by_scanning(nodes, nodes, lambda node, weight: node == weight))

    assert growth(ours) < 4.2
    assert growth(theirs) > 12


def test_b22_no_copy_of_the_weights_is_made(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The competitor deep-copies the model, saves the copy, and opens that: its size three times over."""
    sizes: dict[str, list[int]] = {"ours": [], "theirs": []}
    for width in (960, 96):
        base = saved_decoder(tmp_path / f"base{width}", decoder_graph(width))
        model = load_graph(locate_model(base))
        activations = tuple(group.activation for group in find_groups(model))
        sizes["ours"].append(len(ir.to_proto(tapped_model(model, activations)).SerializeToString()))
        sizes["theirs"].append(len(competitor.augmented_copy(onnx.load(base / "model.onnx"), activations)))
    # Nodes and names are the same; the wider model's dimensions and offsets take a few more bytes.
    assert abs(sizes["ours"][0] - sizes["ours"][1]) < 64
    assert max(sizes["ours"]) < 4096
    assert sizes["theirs"][0] - sizes["theirs"][1] > 3 * 64 * 864 * 4 * 0.99

    with monkeypatch.context() as while_calibrating:
        while_calibrating.setattr(copy, "deepcopy", deepcopy_of_no_model(copy.deepcopy))
        while_calibrating.setattr(onnx, "save", lambda *_, **__: pytest.fail("a model was saved"))
        calibrate_at_random(base)
    watch_mapped_weights(monkeypatch)
    quantize_decoder(commands, base, tmp_path / "int4", "--algo", "rtn_dq")


def deepcopy_of_no_model(deepcopy: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(value: Any, *arguments: Any) -> Any:
        assert not isinstance(value, (onnx.ModelProto, ir.Model, ir.Graph)), "a model was copied"
        return deepcopy(value, *arguments)

    return guarded


def watch_mapped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a weight is still in memory after it was read for its group."""

    def released(model: ir.Model, site: MatMulSite, device: torch.device) -> torch.Tensor:
        weight = read_weight(model, site, device)
        tensor = model.graph.initializers[site.weight].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.raw is None
        return weight

    monkeypatch.setattr("stages.quantize.read_weight", released)


def test_b23_windows_are_full_shuffled_and_hold_no_padding(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """The competitor takes the first rows as they come, pads all to the longest, and counts the padding as text."""
    rows = [f"Row {number} has " + "many " * (number % 7) + "words." for number in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    end = tokenizer.eos_token_id

    def windows(seed: int) -> np.ndarray:
        request = WindowRequest(
            dataset=str(path),
            tokenizer_path=str(tiny_tokenizer),
            vocab_size=300,
            calib_size=20,
            seq_len=64,
            seed=seed,
            use_random=False,
            trust_remote_code=False,
        )
        return load_windows(request).calibration

    def padding(tokens: np.ndarray) -> int:
        """Ends of text that follow one: no text does that."""
        return int((tokens[:, 1:] == end)[tokens[:, :-1] == end].sum())

    def numbers(tokens: np.ndarray) -> list[str]:
        """Which rows were taken, in order."""
        texts = tokenizer.decode(tokens[tokens != end].reshape(-1)).split("<s>")
        return [text.split()[1] for text in texts if text.startswith("Row ") and len(text.split()) > 2]

    ours, again, other = windows(0), windows(0), windows(1)
    assert ours.shape == (18, 64)
    assert padding(ours) == 0
    np.testing.assert_array_equal(ours, again)
    assert numbers(ours)[:5] != numbers(other)[:5]
    assert numbers(ours)[:5] != ["0", "1", "2", "3", "4"]
    theirs = competitor.padded_batch([tokenizer(row)["input_ids"] for row in rows[:18]], 64, end)
    assert padding(theirs) > 0
    assert numbers(theirs)[:5] == ["0", "1", "2", "3", "4"]

"""Mixtures of experts from end to end: what stays is said before the search, and experts nobody chose are rounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
import transformers
from onnx import TensorProto

from scripts.architectures.configs import gpt_oss as gpt_oss_config
from scripts.architectures.configs import lfm2_moe
from stages.model.directory import locate_model
from stages.quantization.weights.store import QuantizedStore
from stages.runtime.feeds import CausalFeeds
from stages.runtime.genai import load_genai
from stages.runtime.session import SessionSettings, open_session
from tests.support.commands import Commands
from tests.support.families import FAMILIES, save_random_model
from tests.support.graphs import TinyGraph
from tests.support.tiny_models import VOCABULARY, build_genai_model
from tests.support.written import fused_sites

pytestmark = pytest.mark.slow

HIDDEN, WIDE, EXPERTS = 64, 32, 4
LENGTH = 24
NEVER_CHOSEN = 3


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """ORT-GenAI folder of a tiny gpt-oss, whose experts the builder puts into MoE nodes."""
    family = next(family for family in FAMILIES if family.name == "gpt-oss")
    folder = tmp_path_factory.mktemp("gpt-oss")
    save_random_model(family.config(), family.width, folder / "hf", tiny_tokenizer)
    build_genai_model(folder / "hf", folder / "base")
    return folder / "base"


def test_experts_inside_moe_nodes_are_named_before_the_search(
    gpt_oss: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuantizedStore, "write", stop)
    options = ("--output_path", tmp_path / "out", "--algo", "rtn_dq", "--experts", "none")
    code, printed = commands.quantize("--onnx_path", gpt_oss, *options)
    assert code == 130
    assert "warning: MatMuls that are quantized: 8" in printed


def test_experts_that_stay_are_named_in_one_line_and_in_the_table(
    gpt_oss: Path, tmp_path: Path, commands: Commands
) -> None:
    options = ("--algo", "rtn_dq", "--block_size", 16, "--exclude", "layers.1", "--experts", 4)
    code, printed = commands.quantize("--onnx_path", gpt_oss, "--output_path", tmp_path / "out", *options)
    assert code == 0, printed
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning:")]
    assert "MatMuls that are quantized: 7; matrices of experts: 24; routers of experts kept: 3; kept as" in warning
    assert "MoE: model.layers.1.moe.experts.gate_up_proj.weight and 1 more" in warning
    assert warning.endswith("--exclude layers.1")
    assert fused_sites(tmp_path / "out") == (7, 7)
    assert "3 x router of a mixture of experts" in printed
    assert "12 x moe/experts.*/gate_up_proj" in printed


def test_experts_become_qmoe_and_answer_almost_as_before(gpt_oss: Path, tmp_path: Path, commands: Commands) -> None:
    tokens, before, errors = np.arange(20)[None] * 7 % VOCABULARY, None, []
    for bits in (4, 8):
        out = tmp_path / f"int{bits}"
        code, printed = commands.quantize(
            "--onnx_path",
            gpt_oss,
            "--output_path",
            out,
            "--algo",
            "rtn_dq",
            "--experts",
            bits,
            "--exclude",
            "attn,lm_head",
        )
        assert code == 0, printed
        graph = ir.load(out / "model.onnx").graph
        nodes = [node for node in graph if node.op_type in ("MoE", "QMoE")]
        assert [(node.op_type, node.attributes.get_int("expert_weight_bits")) for node in nodes] == [("QMoE", bits)] * 4
        assert "16 in 4 QMoE nodes" in printed
        before = logits(gpt_oss, tokens) if before is None else before
        after = logits(out, tokens)
        errors.append(float(np.linalg.norm(after - before) / np.linalg.norm(before)))
        assert len(generated(out, [int(token) for token in tokens[0]])) == LENGTH
    # Rounding of random experts in four layers; an expert in a wrong place gives 0.5 and more.
    assert errors[1] < 0.02 < errors[0] < 0.2


@pytest.mark.thorough
@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_what_is_built_for_a_gpu_becomes_the_qmoe_that_it_reads(
    provider: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path, commands: Commands
) -> None:
    family = next(family for family in FAMILIES if family.name == "gpt-oss")
    save_random_model(family.config(), family.width, tmp_path / "hf", tiny_tokenizer)
    build_genai_model(tmp_path / "hf", tmp_path / "base", "fp16", provider)
    text = ("--dataset", tiny_text, "--calib_size", 12, "--seq_len", 64)
    options = ("--output_path", tmp_path / "int4", "--target", provider)
    code, printed = commands.quantize("--onnx_path", tmp_path / "base", *options, *text)
    assert code == 0, printed
    assert "16 in 4 QMoE nodes" in printed
    assert "experts    tokens: least" in printed
    nodes = [node for node in ir.load(tmp_path / "int4" / "model.onnx").graph if node.op_type in ("MoE", "QMoE")]
    assert [node.op_type for node in nodes] == ["QMoE"] * 4
    raw = {"cuda": 0, "webgpu": None}[provider]
    assert [node.attributes.get_int("weights_prepacked", None) for node in nodes] == [raw] * 4
    assert all(len(node.inputs) == 8 for node in nodes), "no zero points, and the weights of gpt-oss are the operator's"
    tokens = np.arange(20)[None] * 7 % VOCABULARY
    before, after = logits(tmp_path / "base", tokens), logits(tmp_path / "int4", tokens)
    # INT4 without zero points in four layers of random weights; a wrong order of codes gives 0.5 and more.
    assert np.linalg.norm(after - before) < 0.2 * np.linalg.norm(before)
    assert len(generated(tmp_path / "int4", [int(token) for token in tokens[0]])) == LENGTH


def test_a_router_is_stored_as_int8_where_it_is_named(gpt_oss: Path, tmp_path: Path, commands: Commands) -> None:
    code, printed = commands.quantize(
        "--onnx_path", gpt_oss, "--output_path", tmp_path / "out", "--algo", "rtn_dq", "--layers_8bit", "router"
    )
    assert code == 0, printed
    assert "router of a mixture" not in printed
    assert fused_sites(tmp_path / "out") == (12, 12)


def test_experts_are_stored_as_int8_where_nothing_else_is_named(
    gpt_oss: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = commands.quantize(
        "--onnx_path",
        gpt_oss,
        "--output_path",
        tmp_path / "out",
        "--algo",
        "rtn_dq",
        "--layers_8bit",
        "experts",
        "--target",
        "cpu",
    )
    assert code == 0, printed
    nodes = [node for node in ir.load(tmp_path / "out" / "model.onnx").graph if node.op_type == "QMoE"]
    assert [node.attributes.get_int("expert_weight_bits") for node in nodes] == [8] * 4


@pytest.mark.parametrize(
    "extra", [pytest.param((), marks=pytest.mark.thorough), ("moe_quant_type=int4",)], ids=["MoE", "QMoE"]
)
def test_a_mixture_with_short_convolutions_goes_the_whole_way_whatever_its_experts_are_stored_as(
    extra: tuple[str, ...], tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path, commands: Commands
) -> None:
    save_random_model(lfm2_moe(), 0.2, tmp_path / "hf", tiny_tokenizer)
    build_genai_model(tmp_path / "hf", tmp_path / "base", "fp32", "cpu", *extra)
    text = ("--dataset", tiny_text, "--calib_size", 8, "--seq_len", 32)
    code, printed = commands.calibrate("--onnx_path", tmp_path / "base", *text)
    assert code == 0, printed
    target = ("--output_path", tmp_path / "int4", "--accuracy_level", 1, "--target", "cpu", "--lm_head", "none")
    code, printed = commands.quantize("--onnx_path", tmp_path / "base", *target, "--embedding", "none")
    assert code == 0, printed
    assert fused_sites(tmp_path / "int4") == (11, 11)
    assert "3 x router of a mixture of experts" in printed
    assert ("QMoE: model.layers.1.moe.experts.gate_up_proj." in printed) == bool(extra)
    assert ("quantized already" in printed) == bool(extra)
    assert ("12 in 3 QMoE nodes" in printed) != bool(extra)
    assert ("calibration tokens that routers sent to an expert: least" in printed) != bool(extra)
    tokens = np.arange(10)[None] * 7 % VOCABULARY
    before, after = logits(tmp_path / "base", tokens), logits(tmp_path / "int4", tokens)
    # INT4 rounding of random weights in four layers; weights in a wrong place give 1 and more.
    assert np.linalg.norm(after - before) < 0.4 * np.linalg.norm(before)
    first = generated(tmp_path / "int4", [int(token) for token in tokens[0]])[10]
    allowed = after[0, -1].copy()
    allowed[1] = -np.inf
    assert first == int(allowed.argmax())


@pytest.fixture(scope="module")
def structured(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """ORT-GenAI folder of a gpt-oss whose experts have channels of unlike sizes, and whose router prefers some."""
    folder = tmp_path_factory.mktemp("structured")
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 8}
    config = gpt_oss_config()
    config.update(sizes)
    generator = torch.Generator().manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 3:  # of all experts, [experts, inputs, outputs]
                tall = torch.exp(0.8 * torch.randn(*parameter.shape[:2], 1, generator=generator))
                parameter.copy_(noise * tall / parameter.shape[1] ** 0.5)
            elif name.endswith("router.bias"):
                parameter.copy_(torch.linspace(1.5, -1.5, len(parameter)))
            elif "norm" not in name:
                parameter.copy_(
                    noise * (0.3 if "router" in name else 0.25 if "embed" in name or "head" in name else 0.05)
                )
    model.save_pretrained(folder / "hf")
    transformers.AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder / "hf")
    build_genai_model(folder / "hf", folder / "base")
    return folder / "base"


def test_calibrated_experts_lose_half_of_what_rounded_ones_lose(
    structured: Path, tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path, commands: Commands
) -> None:
    only_experts = ("--onnx_path", structured, "--experts", 4, "--exclude", "attn,lm_head")
    text = ("--dataset", tiny_text, "--calib_size", 24, "--seq_len", 128)
    for algorithm, options in (("rtn_dq", ()), ("awq_gptq", text)):
        code, printed = commands.quantize(
            *only_experts, "--output_path", tmp_path / algorithm, "--algo", algorithm, *options
        )
        assert code == 0, printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    # The windows come from the beginning of the text.
    unread = tokenizer(tiny_text.read_text(encoding="utf-8")[-6000:])["input_ids"][: 8 * 128]
    tokens = np.array(unread, np.int64).reshape(8, 128)
    before = log_probabilities(structured, tokens)
    rounded, calibrated = (
        float((np.exp(before) * (before - log_probabilities(tmp_path / name, tokens))).sum(-1).mean())
        for name in ("rtn_dq", "awq_gptq")
    )
    assert calibrated < 0.6 * rounded
    reports = [json.loads(line) for line in (tmp_path / "awq_gptq.weights" / "report.jsonl").read_text().splitlines()]
    seen = [report["tokens"] for report in reports if "/experts." in report["site"]]
    assert len(seen) == 2 * 2 * 8
    assert sum(seen) == 2 * 2 * 2 * 22 * 128, "each of 22 windows' tokens goes to two experts in each of two layers"
    assert max(seen) > 5 * min(seen)


@pytest.mark.thorough
def test_a_budget_chooses_the_format_of_each_nodes_experts_and_its_plan_file_gives_the_same(
    structured: Path, tmp_path: Path, tiny_text: Path, commands: Commands
) -> None:
    text = ("--dataset", tiny_text, "--calib_size", 24, "--seq_len", 128)
    options = (
        "--onnx_path",
        structured,
        "--target",
        "cpu",
        "--algo",
        "awq_lite",
        "--cache_dir",
        tmp_path / "cache",
        *text,
    )
    budget = ("--target_bpw", 6.2)
    code, printed = commands.quantize(*options, "--output_path", tmp_path / "budget", *budget)
    assert code == 0, printed
    assert "nats a token" in printed
    plan = tmp_path / "budget.weights" / "plan.toml"
    assert "/model/layers.1/moe/experts" in plan.read_text()
    code, printed = commands.quantize(*options, "--output_path", tmp_path / "plan", "--plan", plan)
    assert code == 0, printed
    formats = [
        [
            (node.attributes.get_int("expert_weight_bits"), node.attributes.get_int("block_size"))
            for node in ir.load(tmp_path / name / "model.onnx").graph
            if node.op_type == "QMoE"
        ]
        for name in ("budget", "plan")
    ]
    assert formats[0] == formats[1]
    assert {bits for bits, _ in formats[0]} == {4, 8}, "6.2 bits are one node in INT4 and one in INT8"


def log_probabilities(folder: Path, tokens: np.ndarray) -> np.ndarray:
    scores = logits(folder, tokens).astype(np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    directory = locate_model(folder)
    session = open_session(directory.onnx_file, SessionSettings(accuracy_level=1))
    feeds = CausalFeeds.of(session, directory)
    return np.asarray(session.run(["logits"], feeds(tokens))[0])


def generated(folder: Path, prompt: list[int]) -> list[int]:
    model = load_genai(og, folder, provider="cpu")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=LENGTH, min_length=LENGTH, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def expert(graph: TinyGraph, rng: np.random.Generator, index: int) -> str:
    """The tokens that chose this expert, gathered, through up and down, added where they came from."""
    here = graph.node("Equal", ["chosen", graph.constant(f"e{index}", np.array([[index]], np.int64))], [f"{index}.is"])
    rows = graph.node("NonZero", [here], [f"{index}.places"])
    first = graph.constant(f"{index}.zero", np.array([0], np.int64))
    one = graph.constant(f"{index}.one", np.array([1], np.int64))
    rows = graph.node("Slice", [rows, first, one, first], [f"{index}.row"])
    flat = graph.node("Reshape", [rows, graph.constant(f"{index}.flat", np.array([-1], np.int64))], [f"{index}.rows"])
    tokens = graph.node("Gather", ["tokens", flat], [f"{index}.tokens"])
    up = graph.linear(tokens, (rng.standard_normal((HIDDEN, WIDE)) / 8).astype(np.float32), f"{index}.up")
    bent = graph.node("Relu", [up], [f"{index}.bent"])
    down = graph.linear(bent, (rng.standard_normal((WIDE, HIDDEN)) / 6).astype(np.float32), f"{index}.down")
    places = graph.node("Transpose", [rows], [f"{index}.at"], {"perm": [1, 0]})
    return graph.node("ScatterND", ["none", places, down], [f"{index}.out"])


def separate_experts() -> TinyGraph:
    """input_ids -> h -> norm -> router and TopK 1 -> the chosen expert's own MatMuls -> logits.

    The router's bias keeps every token from the last expert.
    """
    rng = np.random.default_rng(0)
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    table = graph.constant("embedding", rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    graph.node("Gather", [table, "input_ids"], ["h"])
    gain = graph.constant("gain", rng.uniform(0.5, 2, HIDDEN).astype(np.float32))
    graph.node("SimplifiedLayerNormalization", ["h", gain], ["x"])
    rows = graph.constant("rows", np.array([-1, HIDDEN], np.int64))
    graph.node("Reshape", ["x", rows], ["tokens"])
    graph.linear("tokens", rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32), "router")
    bias = np.zeros(EXPERTS, np.float32)
    bias[NEVER_CHOSEN] = -1e9
    graph.node("Add", ["router", graph.constant("router.bias", bias)], ["scores"])
    graph.node("TopK", ["scores", graph.constant("k", np.array([1], np.int64))], ["best", "chosen"])
    graph.node("Mul", ["tokens", graph.constant("nothing", np.zeros(1, np.float32))], ["none"])
    graph.node("Sum", [expert(graph, rng, index) for index in range(EXPERTS)], ["mixed"])
    graph.linear("mixed", rng.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32), "flat_logits")
    shape = graph.node("Shape", ["input_ids"], ["shape"])
    end = graph.constant("end", np.array([VOCABULARY], np.int64))
    graph.node("Concat", [shape, end], ["logits_shape"], {"axis": 0})
    graph.node("Reshape", ["flat_logits", "logits_shape"], ["logits"])
    graph.output("logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY])
    return graph


def test_experts_as_matmuls_are_quantized_and_one_that_no_token_chose_is_rounded(
    tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path, commands: Commands
) -> None:
    model = separate_experts().save(tmp_path / "base")
    code, printed = commands.calibrate(
        "--onnx_path", model, "--model_name", tiny_tokenizer, "--dataset", tiny_text, "--calib_size", 8, "--seq_len", 32
    )
    assert code == 0, printed
    code, printed = commands.quantize("--onnx_path", model, "--output_path", tmp_path / "int4", "--block_size", 16)
    assert code == 0, printed
    assert "2 x no calibration token reached it, so it was rounded to nearest" in printed
    assert "MatMuls that are quantized: 8; routers of experts kept: 1" in printed
    lines = (tmp_path / "int4.weights" / "report.jsonl").read_text().splitlines()
    reports = {report["site"]: report for report in map(json.loads, lines)}
    for index in range(EXPERTS):
        for kind in ("up", "down"):
            report = reports[f"{index}.{kind}/MatMul"]
            assert (report["algorithm"], report["loss"] is None) == (
                ("rtn", True) if index == NEVER_CHOSEN else ("awq_gptq", False)
            )
    tokens = np.arange(64, dtype=np.int64).reshape(2, 32) * 5 % VOCABULARY
    before, after = logits(tmp_path / "base", tokens), logits(tmp_path / "int4", tokens)
    # Two layers of INT4 in small blocks; a token that another expert got would differ by more than itself.
    assert np.linalg.norm(after - before) < 0.2 * np.linalg.norm(before)

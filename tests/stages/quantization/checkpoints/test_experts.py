"""Experts of a checkpoint stand in QMoE bit for bit, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file
from torch import Tensor

from genai_quant.base_models.checkpoints import as_builder_input
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.quantization.checkpoints.checkpoint import expert_number
from stages.quantization.weights.store import open_store
from stages.quantize import quantize
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings, open_session
from tests.stages.quantization.checkpoints.packers import Rounded, rounded, save_checkpoint
from tests.support.families import FAMILIES, save_random_model
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, KINDS, Attributes, mixture
from tests.support.tiny_models import build_genai_model

NODE, OUTSIDE = "/model/layers.0/moe/MoE", 24
BLOCK = 16
FINE = {"gate_up.weight": "gate_up_proj", "down.weight": "down_proj"}


def base_of(folder: Path, kind: str = "gpt-oss") -> dict[str, Tensor]:
    """Save a mixture and a MatMul behind it; return the weights as the graph has them."""
    graph = mixture(cast(Attributes, KINDS[kind]))
    weight = np.random.default_rng(4).standard_normal((HIDDEN, OUTSIDE)).astype(np.float32)
    graph.linear("y", weight, "z")
    graph.outputs.clear()
    graph.output("z", TensorProto.FLOAT, ["tokens", OUTSIDE])
    model = graph.model()
    next(node for node in model.graph if node.op_type == "MoE").name = NODE
    next(node for node in model.graph if node.op_type == "MatMul").name = "/model/layers.0/z_proj/MatMul"
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    return {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def unfused(weights: dict[str, Tensor], block: int = BLOCK, **how: bool | int) -> dict[str, Rounded]:
    """Return the layers as llmcompressor and GPTQModel write them: gate, up and down of each expert."""
    found = dict[str, Rounded]()
    for index in range(EXPERTS):
        place, rows = f"model.layers.0.mlp.experts.{index}", weights["gate_up.weight"][index]
        parts = {"gate_proj": rows[0::2], "up_proj": rows[1::2], "down_proj": weights["down.weight"][index]}
        found |= {f"{place}.{name}": rounded(part, block, **how) for name, part in parts.items()}  # type: ignore[arg-type]
    return found


def config_of(folder: Path, **options: object) -> QuantizeConfig:
    given: dict[str, object] = {"checkpoint": folder / "checkpoint", "target": "cpu@1.31", "verify": "full"}
    return QuantizeConfig(onnx_path=folder / "base", output_path=folder / "out", **(given | options))  # type: ignore[arg-type]


def stored_in(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return codes, unsigned, and scales of each site."""
    store = open_store(folder)
    read = [store.read(index, site) for index, group in enumerate(store.recipe.groups) for site in group.sites]
    return {each.site.name: (each.codes.int() + 8 * each.spec.symmetric, each.scales) for each in read}


def outputs(folder: Path) -> np.ndarray:
    generator = np.random.default_rng(5)
    feeds = {"x": generator.standard_normal((9, HIDDEN)), "scores": generator.standard_normal((9, EXPERTS))}
    session = open_session(folder / "model.onnx", SessionSettings(accuracy_level=1))
    return np.asarray(session.run(None, {name: each.astype(np.float32) for name, each in feeds.items()})[0])


@pytest.mark.parametrize(
    ("schema", "symmetric"),
    [
        ("gptq", False),
        pytest.param("gptq", True, marks=pytest.mark.thorough),
        pytest.param("compressed-tensors", True, marks=pytest.mark.thorough),
    ],
)
def test_unfused_experts_give_their_codes_and_the_graph_computes_with_them(
    schema: str, symmetric: bool, tmp_path: Path
) -> None:
    """Gate and up take turns in the graph; the MatMul outside, which the checkpoint lacks, stays."""
    weights = base_of(tmp_path / "base")
    layers = unfused(weights, symmetric=symmetric)
    save_checkpoint(tmp_path / "checkpoint", layers, schema)
    made = quantize(config_of(tmp_path, accuracy_level=1))
    assert made is not None
    found = stored_in(made.weights)
    assert len(found) == 2 * EXPERTS
    for index in range(EXPERTS):
        gate, up, down = (layers[f"model.layers.0.mlp.experts.{index}.{name}_proj"] for name in ("gate", "up", "down"))
        codes, scales = found[f"/model/layers.0/moe/experts.{index}/gate_up_proj"]
        for row, part in enumerate((gate, up)):
            assert torch.equal(codes[row::2], part.codes.int())
            assert torch.equal(scales[row::2].half(), part.scales)
        codes, scales = found[f"/model/layers.0/moe/experts.{index}/down_proj"]
        assert torch.equal(codes, down.codes.int())
        weights["gate_up.weight"][index][0::2], weights["gate_up.weight"][index][1::2] = gate.floats, up.floats
        weights["down.weight"][index] = down.floats
    model = ir.load(tmp_path / "base" / "model.onnx")
    for name in FINE:
        model.graph.initializers[name].const_value = ir.tensor(weights[name].numpy(), name=name)
    (tmp_path / "expected").mkdir()
    ir.save(model, tmp_path / "expected" / "model.onnx")
    np.testing.assert_allclose(outputs(tmp_path / "out"), outputs(tmp_path / "expected"), atol=2e-4)


def test_whole_matrices_wider_blocks_and_the_matmul_beside_them_are_found(tmp_path: Path) -> None:
    """Blocks of 32 don't divide 48 inputs: QMoE's have 16, and each scale stands twice."""
    weights = base_of(tmp_path / "base", "lfm2")
    layers = {
        f"model.layers.0.feed_forward.experts.{index}.{name}": rounded(weights[table][index], 32, symmetric=True)
        for index in range(EXPERTS)
        for table, name in FINE.items()
    }
    outside = rounded(weights["z.weight"].T.contiguous(), 32, symmetric=True)
    save_checkpoint(tmp_path / "checkpoint", layers | {"model.layers.0.z_proj": outside}, "gptq")
    made = quantize(config_of(tmp_path, verify="quick"))
    assert made is not None
    found = stored_in(made.weights)
    for index in range(EXPERTS):
        for name in FINE.values():
            codes, scales = found[f"/model/layers.0/moe/experts.{index}/{name}"]
            expected = layers[f"model.layers.0.feed_forward.experts.{index}.{name}"]
            assert torch.equal(codes, expected.codes.int())
            repeated = expected.scales.repeat_interleave(2, dim=1)[:, : scales.shape[1]]
            assert torch.equal(scales.half(), repeated)
    assert torch.equal(found["/model/layers.0/z_proj/MatMul"][0], outside.codes.int())


@pytest.mark.thorough
def test_the_builders_gpt_oss_computes_with_an_unfused_checkpoint(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The oracle is transformers' model with the numbers that the codes stand for."""
    from transformers import AutoModelForCausalLM

    family = next(each for each in FAMILIES if each.name == "gpt-oss")
    save_random_model(family.config(), family.width, tmp_path / "hf", tiny_tokenizer)
    build_genai_model(as_builder_input(tmp_path / "hf", tmp_path / "readable"), tmp_path / "base", "fp32", "cpu")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    layers, floats = dict[str, Rounded](), dict[str, Tensor]()
    for name, tensor in weights.items():
        place, _, table = name.rpartition(".")
        if not place.endswith("mlp.experts") or table.endswith("bias"):
            floats[name] = tensor
            continue
        for index, matrix in enumerate(tensor):
            rows = matrix.T.contiguous()
            parts = {"gate_proj": rows[0::2], "up_proj": rows[1::2]} if table == "gate_up_proj" else {table: rows}
            made = {part: rounded(each, BLOCK, symmetric=True) for part, each in parts.items()}
            layers |= {f"{place}.{index}.{part}": each for part, each in made.items()}
            read = torch.stack([each.floats for each in made.values()], dim=1).flatten(0, 1)
            weights[name][index] = read.T
    save_checkpoint(tmp_path / "checkpoint", layers, "compressed-tensors", floats)
    quantize(config_of(tmp_path, accuracy_level=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    with open_decoder(locate_model(tmp_path / "out"), SessionSettings(accuracy_level=1), tmp_path) as decoder:
        found = decoder.logits(tokens.numpy())
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("target", "left_out", "reason"),
    [
        ("cpu@1.23", "", "has zero points, and the CPU's QMoE takes none"),
        ("cpu@1.31", ".experts.3.", "has codes for 8 of 10 matrices, and QMoE needs all"),
    ],
)
def test_what_qmoe_cannot_hold_is_refused(target: str, left_out: str, reason: str, tmp_path: Path) -> None:
    layers = unfused(base_of(tmp_path / "base"))
    kept = {name: each for name, each in layers.items() if not left_out or left_out not in name}
    save_checkpoint(tmp_path / "checkpoint", kept, "gptq")
    with pytest.raises(UserError, match=reason):
        quantize(config_of(tmp_path, target=target))
    assert not (tmp_path / "out").exists()


def test_scales_between_an_experts_matrices_are_refused(tmp_path: Path) -> None:
    """AWQ's: rows of up divided, columns of down multiplied; the graph's bias behind up isn't divided."""
    weights = base_of(tmp_path / "base")
    factors = torch.exp(torch.randn(INNER, generator=torch.Generator().manual_seed(0)))
    weights["gate_up.weight"][:, 1::2] /= factors[None, :, None]
    weights["down.weight"] *= factors
    save_checkpoint(tmp_path / "checkpoint", unfused(weights, symmetric=True), "gptq")
    with pytest.raises(UserError, match="multiplied, and nothing"):
        quantize(config_of(tmp_path))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.mlp.experts.5.gate_proj", 5),
        ("model.layers.3.block_sparse_moe.experts.12.w1", 12),
        ("model.layers.3.mlp.experts.gate_up.7", 7),
        ("model.layers.3.mlp.shared_expert.up_proj", None),
        ("model.layers.3.mlp.shared_experts.up_proj", None),
    ],
)
def test_an_experts_number_is_read_from_its_name(name: str, number: int | None) -> None:
    assert expert_number(name) == number

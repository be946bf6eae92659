"""A checkpoint's codes and scales stand in the graph bit for bit, and it computes what the checkpoint does."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genai_quant.base_models.checkpoints import as_builder_input
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import OptionError, UserError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.quantization.plan.plan import plan_model
from stages.quantization.weights.store import QuantizedStore, open_store
from stages.quantize import quantize
from stages.records.formats import PerBlock
from stages.runtime.decoder import open_decoder
from stages.runtime.session import SessionSettings
from tests.stages.quantization.checkpoints.packers import Rounded, rounded, save_checkpoint
from tests.support.families import FAMILIES, save_random_model
from tests.support.tiny_models import build_genai_model

BLOCK = 32
QKV = "/model/layers.0/attn/qkv_proj/MatMul"
DOWN = "/model/layers.0/mlp/down_proj/MatMul"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights(tiny_hf: Path) -> Weights:
    return load_file(tiny_hf / "model.safetensors")


def decoder_layers(weights: Weights) -> Weights:
    return {name.removesuffix(".weight"): each for name, each in weights.items() if name.endswith("_proj.weight")}


def all_rounded(weights: Weights, *, bits: int = 4, symmetric: bool = False) -> dict[str, Rounded]:
    return {name: rounded(each, BLOCK, bits, symmetric=symmetric) for name, each in decoder_layers(weights).items()}


def floats(weights: Weights) -> Weights:
    return {name: each for name, each in weights.items() if not name.endswith("_proj.weight")}


def config_of(base: Path, tmp_path: Path, **options: object) -> QuantizeConfig:
    given: dict[str, object] = {"accuracy_level": 1, "verify": "quick", "checkpoint": tmp_path / "checkpoint"}
    return QuantizeConfig(onnx_path=base, output_path=tmp_path / "out", **(given | options))  # type: ignore[arg-type]


def found_in(config: QuantizeConfig) -> dict[str, Tensor]:
    """Return the codes of every site, unsigned, as the plan would write them."""
    directory = locate_model(config.onnx_path)
    plan = plan_model(config, load_graph(directory), directory)
    assert plan.imported is not None
    assert pickle.loads(pickle.dumps(plan.imported)).sites.keys() == plan.imported.sites.keys(), "processes send it"
    solved = [plan.imported.solved(group) for group in plan.sites.groups]
    return {
        weight.site.name: weight.codes.int() + (1 << (weight.spec.bits - 1) if weight.spec.symmetric else 0)
        for group in solved
        if group is not None
        for weight in group.weights
    }


def logits_of(folder: Path, scratch: Path) -> Tensor:
    settings = SessionSettings(accuracy_level=1)
    with open_decoder(locate_model(folder), settings, scratch) as decoder:
        return torch.from_numpy(decoder.logits(np.arange(3, 40)[None]))


def logits_with(hf: Path, weights: Weights) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf)
    model.load_state_dict(weights)
    with torch.no_grad():
        logits: Tensor = model(torch.arange(3, 40)[None]).logits
    return logits


def as_read(weights: Weights, layers: dict[str, Rounded]) -> Weights:
    return weights | {f"{name}.weight": each.floats for name, each in layers.items()}


def awq_scaled(weights: Weights) -> Weights:
    """Multiply columns and divide what comes before them, as AWQ does: norms, and up_proj's rows."""
    generator, scaled = torch.Generator().manual_seed(3), dict(weights)

    def scales(size: int) -> Tensor:
        return torch.exp(0.5 * torch.randn(size, generator=generator))

    for layer in ("model.layers.0", "model.layers.1"):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factors = scales(64)
            scaled[f"{layer}.{norm}.weight"] = scaled[f"{layer}.{norm}.weight"] / factors
            for reader in readers:
                scaled[f"{layer}.{reader}.weight"] = scaled[f"{layer}.{reader}.weight"] * factors
        factors = scales(96)
        scaled[f"{layer}.mlp.up_proj.weight"] = scaled[f"{layer}.mlp.up_proj.weight"] / factors[:, None]
        scaled[f"{layer}.mlp.down_proj.weight"] = scaled[f"{layer}.mlp.down_proj.weight"] * factors
    return scaled


@pytest.mark.slow
def test_awqs_scales_go_into_the_norms_and_the_graph_computes_what_the_checkpoint_does(
    tiny_hf: Path, tiny_model: Path, weights: Weights, tmp_path: Path
) -> None:
    scaled = awq_scaled(weights)
    layers = all_rounded(scaled)
    save_checkpoint(tmp_path / "checkpoint", layers, "awq", floats(scaled))
    made = quantize(config_of(tiny_model, tmp_path))
    assert made is not None
    assert {(fold.how, fold.reason) for fold in made.export.folds} == {("norm", ""), ("none", "")}
    expected = logits_with(tiny_hf, as_read(scaled, layers))
    assert torch.allclose(logits_of(tmp_path / "out", tmp_path), expected, atol=1e-3)
    _require_codes(open_store(made.weights), layers)
    assert quantize(config_of(tiny_model, tmp_path)) == made


def _require_codes(store: QuantizedStore, layers: dict[str, Rounded]) -> None:
    """Raise unless codes, scales and zero points of every site are those of the layers, in the builder's order."""
    assert not store.recipe.byte_scales, "bytes would move the scales"
    checked = 0
    for index, group in enumerate(store.recipe.groups):
        for site in group.sites:
            read, (_, _, layer, room, name, _) = store.read(index, site), site.name.split("/")
            parts = ("q_proj", "k_proj", "v_proj") if name == "qkv_proj" else (name,)
            place = {"attn": "self_attn"}.get(room, room)
            wanted = [layers[f"model.{layer}.{place}.{part}"] for part in parts]
            assert torch.equal(read.codes, torch.cat([each.codes for each in wanted]))
            assert torch.equal(read.scales, torch.cat([each.scales for each in wanted]))
            assert read.zero_points is not None
            assert torch.equal(read.zero_points, torch.cat([each.zeros for each in wanted]))
            checked += 1
    assert checked == 10


@pytest.mark.parametrize(
    ("schema", "bits", "symmetric"),
    [
        ("gptq", 4, True),
        ("gptq_v2", 8, False),
        ("awq", 4, False),
        ("auto-round", 4, True),
        ("compressed-tensors", 4, True),
        ("int-quantized", 8, False),
        ("olive", 4, False),
    ],
)
def test_every_schema_gives_its_codes(
    schema: str, bits: int, symmetric: bool, tiny_model: Path, weights: Weights, tmp_path: Path
) -> None:
    layers = all_rounded(weights, bits=bits, symmetric=symmetric)
    save_checkpoint(tmp_path / "checkpoint", layers, schema, floats(weights))
    found = found_in(config_of(tiny_model, tmp_path))
    assert len(found) == 10
    parts = [layers[f"model.layers.0.self_attn.{name}"].codes for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(found[QKV], torch.cat(parts).int())


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["phi-3.5", "gemma-3", "qwen2.5", "nemotron"])
def test_packed_projections_and_norms_of_families_are_found(name: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Phi packs qkv, and gate and up; Gemma's and Nemotron's norms are stored less 1; Qwen has biases."""
    family = next(each for each in FAMILIES if each.name == name)
    save_random_model(family.config(), family.width, tmp_path / "hf", tiny_tokenizer)
    source = as_builder_input(tmp_path / "hf", tmp_path / "readable")
    build_genai_model(source, tmp_path / "base", "fp32", "cpu")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    layers = all_rounded(weights)
    save_checkpoint(tmp_path / "checkpoint", layers, "awq", floats(weights))
    config, directory = config_of(tmp_path / "base", tmp_path), locate_model(tmp_path / "base")
    plan = plan_model(config, load_graph(directory), directory)
    assert plan.imported is not None
    assert [name for name, _ in plan.sites.skipped if "lm_head" not in name] == []
    used = {piece.module for site in plan.imported.sites.values() for pieces in site.turns for piece in pieces}
    assert used == set(layers)
    assert all(site.input_scale is None for site in plan.imported.sites.values())


@pytest.mark.thorough
@pytest.mark.parametrize("schema", ["gptq", "auto-round", "compressed-tensors", "olive"])
def test_the_graph_computes_with_the_weights_of_every_schema(
    schema: str, tiny_hf: Path, tiny_model: Path, weights: Weights, tmp_path: Path
) -> None:
    layers = all_rounded(weights)
    save_checkpoint(tmp_path / "checkpoint", layers, schema, floats(weights))
    quantize(config_of(tiny_model, tmp_path, verify="full"))
    expected = logits_with(tiny_hf, as_read(weights, layers))
    assert torch.allclose(logits_of(tmp_path / "out", tmp_path), expected, atol=1e-3)


def test_layers_of_several_formats_are_widened_exactly(tiny_model: Path, weights: Weights, tmp_path: Path) -> None:
    layers = all_rounded(weights, symmetric=True)
    values = "model.layers.0.self_attn.v_proj"
    layers[values] = rounded(weights[f"{values}.weight"], 16, 8)
    save_checkpoint(tmp_path / "checkpoint", layers, "compressed-tensors", floats(weights), group_size=BLOCK)
    config, directory = config_of(tiny_model, tmp_path), locate_model(tiny_model)
    plan = plan_model(config, load_graph(directory), directory)
    spec = plan.sites.specs[QKV]
    assert (spec.bits, spec.symmetric, spec.granularity) == (8, False, PerBlock(block_size=16))
    assert plan.imported is not None
    solved = plan.imported.solved(plan.sites.groups[0])
    assert solved is not None
    weight = solved.weights[0]
    assert weight.zero_points is not None
    stored = (weight.codes.float() - weight.zero_points.repeat_interleave(16, 1)) * weight.scales.repeat_interleave(
        16, 1
    )
    wanted = [layers[f"model.layers.0.self_attn.{name}"].floats for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(stored, torch.cat(wanted))


@pytest.mark.slow
def test_what_the_checkpoint_leaves_stays_unless_it_is_named(
    tiny_model: Path, weights: Weights, tmp_path: Path
) -> None:
    layers = all_rounded(weights)
    del layers["model.layers.1.mlp.down_proj"], layers["model.layers.0.mlp.up_proj"]
    save_checkpoint(tmp_path / "checkpoint", layers, "gptq", floats(weights))
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    plan = plan_model(config_of(tiny_model, tmp_path), model, directory)
    left = {"/lm_head/MatMul", "/model/layers.1/mlp/down_proj/MatMul", "/model/layers.0/mlp/up_proj/MatMul"}
    assert dict(plan.sites.skipped) == dict.fromkeys(left, "--checkpoint leaves it in floating point")
    assert plan.embeddings == ()
    asked = config_of(tiny_model, tmp_path, lm_head="8", layers_8bit="down_proj,up_proj", embedding="8", algo="rtn_dq")
    plan = plan_model(asked, model, directory)
    assert plan.sites.skipped == ()
    assert {plan.sites.specs[name].bits for name in left} == {8}
    assert len(plan.embeddings) == 1
    searched = {group.sites[0].name: group for group in plan.sites.groups if group.sites[0].name in left}
    assert all(len(group.sites) == 1 for group in searched.values())
    assert searched["/model/layers.1/mlp/down_proj/MatMul"].absorber is None, "up_proj's codes must stay"
    quantize(asked)
    assert logits_of(tmp_path / "out", tmp_path).isfinite().all()


def refusal(base: Path, tmp_path: Path, layers: dict[str, Rounded], kept: Weights, schema: str = "gptq") -> str:
    save_checkpoint(tmp_path / "checkpoint", layers, schema, kept)
    with pytest.raises(UserError) as refused:
        quantize(config_of(base, tmp_path))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.weights").exists()
    return str(refused.value)


def test_a_checkpoint_of_another_model_is_refused(tiny_model: Path, weights: Weights, tmp_path: Path) -> None:
    other = {name: torch.randn_like(each) for name, each in weights.items()}
    assert "is not of the base's model" in refusal(tiny_model, tmp_path, all_rounded(other), floats(other))
    queries = "model.layers.1.self_attn.q_proj"
    changed = weights | {f"{queries}.weight": weights[f"{queries}.weight"].flip(0)}
    said = refusal(tiny_model, tmp_path, all_rounded(changed), floats(changed))
    assert "'model.layers.1.self_attn." in said
    assert "is near none of the base's weights" in said
    noisy = {name: each + 0.6 * each.std() * torch.randn_like(each) for name, each in weights.items()}
    said = refusal(tiny_model, tmp_path, all_rounded(noisy), floats(noisy))
    assert "holds other weights than the base (/model/layers.0/attn/qkv_proj/MatMul is off by 5" in said


def test_a_row_that_a_quantizer_lost_is_taken_over_with_a_warning(
    tiny_model: Path, weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = all_rounded(weights, symmetric=True)
    down = "model.layers.0.mlp.down_proj"
    broken = weights[f"{down}.weight"].clone()
    broken[3] = -broken[3].roll(1)
    layers[down] = rounded(broken, BLOCK, symmetric=True)
    save_checkpoint(tmp_path / "checkpoint", layers, "gptq", floats(weights))
    config = config_of(tiny_model, tmp_path)
    directory = locate_model(tiny_model)
    imported = plan_model(config, load_graph(directory), directory).imported
    assert imported is not None
    assert imported.sites[DOWN].error < 0.2
    assert f"{DOWN}: 1 row of the checkpoint's" in caplog.text


def test_scales_that_nothing_undoes_are_refused(tiny_model: Path, weights: Weights, tmp_path: Path) -> None:
    scaled = awq_scaled(weights)
    norms = {name: each for name, each in weights.items() if "norm" in name}
    said = refusal(tiny_model, tmp_path, all_rounded(scaled), floats(scaled) | norms, "awq")
    assert "has the inputs of /model/layers.0/attn/qkv_proj/MatMul multiplied, and no norm" in said
    layers = all_rounded(scaled)
    del layers["model.layers.0.mlp.up_proj"]
    said = refusal(tiny_model, tmp_path, layers, floats(scaled), "awq")
    assert "has the inputs of /model/layers.0/mlp/down_proj/MatMul multiplied, and nothing here that undoes it" in said
    layers = all_rounded(scaled)
    del layers["model.layers.0.mlp.down_proj"]
    said = refusal(tiny_model, tmp_path, layers, floats(scaled), "awq")
    assert "has the outputs of /model/layers.0/mlp/up_proj/MatMul multiplied, and nothing behind it" in said


def test_blocks_that_no_power_of_two_divides_are_refused(tiny_model: Path, weights: Weights, tmp_path: Path) -> None:
    layers = {name: rounded(each, 24) for name, each in decoder_layers(weights).items()}
    said = refusal(tiny_model, tmp_path, layers, floats(weights), "olive")
    assert "shares scales among 24 inputs" in said


@pytest.mark.parametrize(
    "options",
    [{"target_bpw": 4.5}, {"refine": True}, {"algo": "signround"}, {"use_zero_point": True}, {"block_size": 32}],
)
def test_options_that_would_change_codes_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--checkpoint"):
        config_of(tmp_path, tmp_path, **options).validate()

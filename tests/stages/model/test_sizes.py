"""Check that every byte of a model has one name, and that those of quantized weights follow from their shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.model.directory import locate_model
from stages.model.sizes import CODES, EMBEDDING, GRAPH, MATRICES, SCALES, ZERO_POINTS, model_bytes, size_parts
from stages.quantization.weights.store import open_store
from tests.support.commands import Commands

VOCABULARY = 300


def parts(base: Path, quantized: Path) -> dict[str, tuple[int, int]]:
    directories = locate_model(base), locate_model(quantized)
    found = {part.name: (part.before, part.after) for part in size_parts(*directories)}
    for side, directory in enumerate(directories):
        assert sum(pair[side] for pair in found.values()) == model_bytes(directory)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["dq", "matmul_nbits"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_codes_scales_and_zero_points_are_counted(
    tiny_model: Path, tmp_path: Path, commands: Commands, operator: str, zero_point: bool
) -> None:
    options = ["--algo", "rtn_dq", "--block_size", 32, "--weight_operator", operator]
    options += ["--layers_8bit", "layers.1/mlp/down_proj", "--int8_block_size", 32]
    options += ["--use_zero_point"] if zero_point else []
    code, printed = commands.quantize("--onnx_path", tiny_model, "--output_path", tmp_path / "int4", *options)
    assert code == 0, printed
    found = parts(tiny_model, tmp_path / "int4")
    sites = [site for group in open_store(tmp_path / "int4.weights").recipe.groups for site in group.sites]
    numbers = {8: 0, 4: 0}
    for site in sites:
        numbers[8 if "layers.1/mlp/down_proj" in site.name else 4] += site.in_features * site.out_features
    assert found[CODES[4]] == (0, numbers[4] // 2)
    assert found[CODES[8]] == (0, numbers[8])
    assert found[SCALES] == (0, 4 * (numbers[4] + numbers[8]) // 32)
    if zero_point:
        assert found[ZERO_POINTS][1] >= numbers[4] // 64 + numbers[8] // 32
    # What is left of the matrices is lm_head; nothing else of them was one.
    hidden = sites[0].in_features
    head = 4 * VOCABULARY * hidden
    assert found[MATRICES] == (head + 4 * sum(numbers.values()), head)
    assert found[EMBEDDING] == (head, head)
    assert 0 < found[GRAPH][1] < 200_000


def test_a_quantized_embedding_is_an_embedding(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    options = ["--algo", "rtn_dq", "--block_size", 32, "--gather_quantize_axis", 1]
    code, printed = commands.quantize("--onnx_path", tiny_model, "--output_path", tmp_path / "int4", *options)
    assert code == 0, printed
    before, after = parts(tiny_model, tmp_path / "int4")[EMBEDDING]
    # Half a byte a number and a scale of 4 bytes for 32 of them, in place of 4 bytes a number.
    assert after == before * (0.5 + 4 / 32) / 4

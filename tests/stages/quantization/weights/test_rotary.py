"""Tables that the builder writes are known by their numbers, bit for bit; what frequencies don't give is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from stages.quantization.weights.rotary import find_rotary_tables
from tests.support.graphs import TinyGraph
from tests.support.rotary import built_tables, lookup_of_tables

HALF = 32


def _plain(half: int = HALF, theta: float = 1e4) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half))


def _llama3() -> torch.Tensor:
    inverse = _plain(theta=5e5)
    smooth = (8192 * inverse / (2 * torch.pi) - 1) / 3
    return torch.where(
        smooth > 1, inverse, torch.where(smooth < 0, inverse / 8, (1 - smooth) * inverse / 8 + smooth * inverse)
    )


SCALINGS = {
    "plain": (8192, _plain(), 1.0),
    "one million": (32768, _plain(theta=1e6), 1.0),
    "linear": (4096, _plain() / 8, 1.0),
    "llama3": (16384, _llama3(), 1.0),
    "yarn": (5000, _plain() * torch.linspace(1, 1 / 16, HALF), 0.1 * float(np.log(16)) + 1),
    "longrope": (4097, _plain() / torch.linspace(1, 60, HALF), 1.1902380714238083),
    "part of them turn": (2048, torch.cat([_plain(8), torch.zeros(24)]), 1.0),
    "one column": (8192, _plain(1), 1.0),
}


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_frequencies_and_magnitude_are_read_from_the_tables(scaling: str) -> None:
    positions, frequencies, magnitude = SCALINGS[scaling]
    (found,) = find_rotary_tables(lookup_of_tables(built_tables(positions, frequencies, magnitude)).model())
    assert (found.cosines.name, found.sines.name) == ("cos", "sin")
    assert (found.positions, found.magnitude) == (positions, float(np.float32(magnitude)))
    # What the last position doesn't tell apart can't matter.
    error = np.abs(found.frequencies.astype(np.float64) - frequencies.double().numpy()) * positions
    assert error.max() < 1e-6
    assert found.saved_bytes == 2 * 4 * positions * len(frequencies) - 4 * len(frequencies) - 4096


def test_pairs_of_one_shape_are_not_mixed_up() -> None:
    tables = built_tables(2048, _plain(), 1.0), built_tables(2048, _plain(theta=1e6), 1.0)
    graph = lookup_of_tables(*tables)
    pairs = find_rotary_tables(graph.model())
    assert [(pair.cosines.name, pair.sines.name) for pair in pairs] == [("cos", "sin"), ("cos_2", "sin_2")]


def _a_number_off(cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sin[1500, 7] += 1e-6
    return cos, sin


def _not_a_number(cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos[1500, 7] = np.nan
    return cos, sin


def _angles_of_float16(cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(len(cos))[:, None].astype(np.float16) * _plain().numpy().astype(np.float16)
    return np.cos(angles.astype(np.float32)), np.sin(angles.astype(np.float32))


def _two_ranges(cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([cos[:512], cos[:1536]]), np.concatenate([sin[:512], sin[:1536]])


OTHERS: list[Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = [
    _a_number_off,
    _not_a_number,
    _angles_of_float16,
    _two_ranges,
    lambda cos, sin: (cos.astype(np.float16), sin.astype(np.float16)),
    lambda cos, sin: (cos[:100], sin[:100]),
    lambda cos, sin: (cos, sin[:, ::-1].copy()),
    lambda cos, sin: (cos[1:], sin[1:]),
    lambda cos, _: (cos, cos),
]


@pytest.mark.parametrize("changed", OTHERS)
def test_other_tables_are_left_alone(
    changed: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> None:
    cos, sin = changed(*built_tables(2048, _plain(), 1.0))
    assert find_rotary_tables(lookup_of_tables((cos, sin)).model()) == ()


def test_what_a_caller_may_read_or_replace_stays() -> None:
    cos, sin = built_tables(2048, _plain(), 1.0)
    as_output = lookup_of_tables((cos, sin))
    as_output.output("cos", TensorProto.FLOAT, cos.shape)
    as_input = lookup_of_tables((cos, sin))
    as_input.input("cos", TensorProto.FLOAT, cos.shape)
    old = lookup_of_tables((cos, sin))
    old.opset = 10
    assert [find_rotary_tables(graph.model()) for graph in (as_output, as_input, old)] == [(), (), ()]


def test_without_the_data_file_there_are_none(tmp_path: Path) -> None:
    path = lookup_of_tables(built_tables(2048, _plain(), 1.0)).save(tmp_path)
    model = ir.load(path)
    assert len(find_rotary_tables(model)) == 1
    path.with_name("model.onnx.data").unlink()
    assert find_rotary_tables(ir.load(path)) == ()


def test_weights_are_no_tables() -> None:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [2, 256])
    graph.linear("x", np.zeros((256, 256), np.float32), "zeros")
    graph.linear("x", np.ones((256, 256), np.float32), "ones")
    for name in ("zeros", "ones"):
        graph.output(name, TensorProto.FLOAT, [2, 256])
    assert find_rotary_tables(graph.model()) == ()

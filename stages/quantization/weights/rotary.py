"""Find tables of rotary embeddings that a graph can compute when it is loaded, from one frequency a column.

Such a table holds magnitude * cos(position * frequency), or sin, where the angle is a float32 product. Scalings of the
rotation (llama3, yarn, longrope, linear) change the frequencies and the magnitude only. These are read from the table
itself, and a table that they don't give again is none of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32, Float64

_FEWEST_BYTES = 1 << 14
"""The nodes in the place of smaller tables would take much of what these do."""
_NODE_BYTES = 4096
"""Of the nodes, names and constants in the place of two tables; about 2,000 were seen."""
_RANGE_OPSET = 11
"""First with Range, which makes the positions."""
_PROBED_ROWS = 256
_CHUNK = 4096
TOLERANCE = 2.0**-22
"""Largest difference in units of the magnitude. Whoever wrote the table and the runtime that computes it may each be
one unit in the last place of float32 away from the true number; a frequency next to the right one is much further."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryTables:
    """A table of cosines and one of sines, with what gives both."""

    cosines: ir.Value
    """An initializer, or the output of a Constant."""
    sines: ir.Value
    positions: int
    frequencies: Float32[np.ndarray, " D"]
    magnitude: float

    @property
    def saved_bytes(self) -> int:
        """Return the bytes that the tables take more than the nodes that compute them."""
        return 2 * self.positions * self.frequencies.nbytes - self.frequencies.nbytes - _NODE_BYTES


def find_rotary_tables(model: ir.Model) -> tuple[RotaryTables, ...]:
    """Return the pairs of float32 tables [positions, D] that frequencies give, subgraphs' constants included.

    There are none in graphs of opset 10 or less, or where the files of the weights are missing.
    """
    if max(model.opset_imports.get(domain, 0) for domain in ("", "ai.onnx")) < _RANGE_OPSET:
        return ()
    return tuple(pair for graph in model.graphs() for pair in _pairs(graph, model.graph))


def stored_numbers(value: ir.Value) -> np.ndarray | None:
    """Return the numbers of an initializer or a Constant without copying them; None for any other value."""
    tensor = _tensor(value)
    return None if tensor is None else tensor.numpy()


def _pairs(graph: ir.Graph, main: ir.Graph) -> Iterator[RotaryTables]:
    tables = [value for value in _constants(graph) if _may_be_table(value, main)]
    try:
        first_rows = {value: np.array(_rows(value)[0]) for value in tables}
        sines = [value for value in tables if not first_rows[value].any()]
        for cosines in tables:
            magnitude = float(first_rows[cosines][0])
            if not (0 < magnitude < np.inf and (first_rows[cosines] == magnitude).all()):
                continue
            found = (_as_pair(cosines, each, magnitude) for each in sines if each.shape == cosines.shape)
            pair = next(filter(None, found), None)
            if pair is not None:
                sines.remove(pair.sines)
                yield pair
    except (OSError, ValueError):  # the data file is missing or cut short
        return
    finally:
        for tensor in map(_tensor, tables):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from (node.outputs[0] for node in graph if node.op_type == "Constant" and "value" in node.attributes)


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    maker = value.producer()
    if maker is None:
        return value.const_value
    return maker.attributes["value"].as_tensor() if maker.op_type == "Constant" else None


def _may_be_table(value: ir.Value, main: ir.Graph) -> bool:
    tensor = _tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    replaceable = value.is_graph_input() or value in main.outputs
    return tensor.nbytes >= _FEWEST_BYTES and not replaceable and bool(value.uses() or value.is_graph_output())


def _rows(value: ir.Value) -> Float32[np.ndarray, "P D"]:
    numbers = stored_numbers(value)
    assert numbers is not None
    return numbers


def _as_pair(cosines: ir.Value, sines: ir.Value, magnitude: float) -> RotaryTables | None:
    cos, sin = _rows(cosines), _rows(sines)
    places = np.unique(np.linspace(0, len(cos) - 1, min(_PROBED_ROWS, len(cos))).astype(np.int64))
    probed = cos[places].astype(np.float64) / magnitude, sin[places].astype(np.float64) / magnitude
    if not np.allclose(probed[0] ** 2 + probed[1] ** 2, 1, atol=1e-5):
        return None
    frequencies = _nearest(_frequencies(cos, sin), places, *probed)
    if not frequencies.any():
        return None
    found = RotaryTables(cosines=cosines, sines=sines, positions=len(cos), frequencies=frequencies, magnitude=magnitude)
    return found if _gives(found, cos, sin) else None


def _frequencies(cos: Float32[np.ndarray, "P D"], sin: Float32[np.ndarray, "P D"]) -> Float64[np.ndarray, " D"]:
    """Return the angle of one position to the precision that the last power of two has.

    Its product with a power of two is exact, and each is known well enough to tell how often twice it goes round.
    """
    found = np.zeros(cos.shape[1])
    step = 1
    while step < len(cos):
        missed = np.arctan2(sin[step], cos[step], dtype=np.float64) - found * step
        found += (missed - 2 * np.pi * np.round(missed / (2 * np.pi))) / step
        step *= 2
    return found


def _nearest(
    estimate: Float64[np.ndarray, " D"],
    places: np.ndarray,
    cos: Float64[np.ndarray, "rows D"],
    sin: Float64[np.ndarray, "rows D"],
) -> Float32[np.ndarray, " D"]:
    """Return the float32 number beside each estimate that gives the probed rows best."""
    middle = estimate.astype(np.float32)
    candidates = np.stack([middle, np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))])
    angles = _angles(places, candidates[:, None, :])
    errors = np.abs(np.cos(angles) - cos).max(axis=1) + np.abs(np.sin(angles) - sin).max(axis=1)
    best: Float32[np.ndarray, " D"] = candidates[errors.argmin(axis=0), np.arange(len(middle))]
    return best


def _angles(positions: np.ndarray, frequencies: Float32[np.ndarray, "... D"]) -> Float64[np.ndarray, "... rows D"]:
    """Return position * frequency, rounded as float32 products are."""
    products: Float32[np.ndarray, "... rows D"] = positions[:, None].astype(np.float32) * frequencies
    return products.astype(np.float64)


def _gives(tables: RotaryTables, cos: Float32[np.ndarray, "P D"], sin: Float32[np.ndarray, "P D"]) -> bool:
    for start in range(0, tables.positions, _CHUNK):
        rows = slice(start, min(start + _CHUNK, tables.positions))
        angles = _angles(np.arange(rows.start, rows.stop), tables.frequencies)
        for stored, true in ((cos, np.cos(angles)), (sin, np.sin(angles))):
            if not np.abs(stored[rows] - tables.magnitude * true).max() <= TOLERANCE * tables.magnitude:
                return False
    return True

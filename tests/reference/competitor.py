"""What the tool that this one replaces gets wrong, written again from its description: negative controls.

Numbers B1 to B23 are those of tests/test_known_bugs.py, where every function here fails what ours passes. The layout is
theirs: a weight is [K, N], y = x W; blocks run along the first axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# --------------------------------------------------------------------------- rounding


def block_scales(weight: np.ndarray, block_size: int, bits: int = 4) -> np.ndarray:
    """|w|max / 7 of every block, [K / B, N], in the weight's type."""
    largest = np.abs(weight.reshape(-1, block_size, weight.shape[1])).max(axis=1)
    return np.maximum(largest / weight.dtype.type(2 ** (bits - 1) - 1), weight.dtype.type(1e-5))


def symmetric_codes(weight: np.ndarray, scales: np.ndarray, block_size: int, bits: int = 4) -> np.ndarray:
    top = 2 ** (bits - 1)
    return np.clip(np.rint(weight / np.repeat(scales, block_size, axis=0)), -top, top - 1)


def round_trip(weight: np.ndarray, block_size: int, bits: int = 4) -> np.ndarray:
    scales = block_scales(weight, block_size, bits)
    return symmetric_codes(weight, scales, block_size, bits) * np.repeat(scales, block_size, axis=0)


def asymmetric_round_trip(block: np.ndarray) -> np.ndarray:
    """B9: the range of a block need not hold 0, and the zero point is then cut off."""
    scale = max(block.max() - block.min(), 1e-5) / 15
    zero_point = np.clip(-np.rint(block.min() / scale), 0, 15)
    return (np.clip(np.rint(block / scale) + zero_point, 0, 15) - zero_point) * scale


def stored_codes(codes: np.ndarray) -> np.ndarray:
    """B10: unsigned codes go through int8."""
    return codes.astype(np.int8)


def codes_before_the_scale_is_stored(weight: np.ndarray, block_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """B19: codes for the unrounded scale, and the float16 scale that is stored."""
    scales = block_scales(weight, block_size, bits)
    return symmetric_codes(weight, scales, block_size, bits), scales.astype(np.float16)


# --------------------------------------------------------------------------- searches


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    alpha: float
    scale: np.ndarray
    loss: float


def weight_importance(weight: np.ndarray, block_size: int) -> np.ndarray:
    """B6: [K, N] is cut as if it were [B, anything], so a group holds every (K / B)-th channel."""
    columns = np.abs(weight).reshape(block_size, -1)
    tiny = np.finfo(weight.dtype).tiny
    return (columns / (columns.max(axis=0) + tiny)).reshape(weight.shape).mean(axis=1)


def input_scale(tokens: np.ndarray, weight: np.ndarray, block_size: int, alpha: float) -> np.ndarray:
    importance = weight_importance(weight, block_size) ** (1 - alpha) + np.finfo(weight.dtype).tiny
    scale = np.clip(np.abs(tokens).mean(axis=0) ** alpha / importance, 1e-4, 1e4)
    return scale / np.sqrt(scale.max() * scale.min())


def search_input_scale(tokens: np.ndarray, weight: np.ndarray, block_size: int, alpha_step: float = 0.1) -> ScaleSearch:
    """B3: ``alpha_step`` is not used. B4: no candidate is plain rounding."""
    found = []
    for alpha in np.arange(11) / 10:
        scale = input_scale(tokens, weight, block_size, alpha)
        output = (tokens / scale) @ round_trip(weight * scale[:, None], block_size)
        found.append(ScaleSearch(alpha=alpha, scale=scale, loss=float(np.square(tokens @ weight - output).mean())))
    return min(found, key=lambda candidate: candidate.loss)


def shared_scale(siblings: Sequence[np.ndarray]) -> np.ndarray:
    """B5: the mean of what each sibling found alone."""
    return np.mean(siblings, axis=0)


def sampled_rows(num_tokens: int) -> np.ndarray:
    """B8: the rows that the clip search looks at, at equal distances that divide the sequence length."""
    return np.arange(0, num_tokens, max(1, num_tokens // 64))


def loss_in_the_weights_type(output: np.ndarray, wanted: np.ndarray) -> np.floating:
    """B17: differences are squared in float16."""
    with np.errstate(over="ignore"):
        return np.square(output - wanted).mean()


def output_in_the_weights_type(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """B18: a float16 product, which NumPy computes without any BLAS."""
    return tokens @ weight


def padded_batch(documents: Sequence[Sequence[int]], longest: int, end_of_text: int) -> np.ndarray:
    """B23: the first documents in their order, cut off, and filled up with EOS to the longest of them."""
    cut = [list(document[:longest]) for document in documents]
    width = max(map(len, cut))
    return np.array([document + [end_of_text] * (width - len(document)) for document in cut])


# --------------------------------------------------------------------------- graphs


def fused_initializer(initializer: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """B1: what divides a norm's gain asks for CuPy's ``get``, also where the array is NumPy's."""
    fused: np.ndarray = (initializer / scale).get()  # type: ignore[attr-defined]
    return fused


def fuse_into_parent(model: onnx.ModelProto, parent: str, weights: Sequence[str], scale: np.ndarray) -> None:
    """B15: every initializer of the parent is divided in place, and the siblings are crossed off for each of them."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    pending = dict.fromkeys(weights, scale)
    node = next(node for node in model.graph.node if node.name == parent)
    for name in node.input:
        if name not in initializers:
            continue
        stored = numpy_helper.to_array(initializers[name])
        divided = (stored / scale[None]).astype(np.float32).reshape(stored.shape)
        initializers[name].CopyFrom(numpy_helper.from_array(divided, name))
        for weight in weights:
            del pending[weight]


def gated_output_of_a_late_fold(
    tokens: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, scale: np.ndarray, block_size: int
) -> np.ndarray:
    """B14: up's codes are fixed before 1 / s is fused into its floating-point weight, which nobody reads any more."""
    codes = round_trip(up, block_size, bits=8)
    up = up / scale
    return (gate * (tokens @ codes)) @ round_trip(down * scale[:, None], block_size, bits=8)


def rewire_every_consumer(model: onnx.ModelProto, weight: str, replacement: str) -> None:
    """B16: whoever reads the weight gets the quantized one."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == weight:
                node.input[index] = replacement


def without_block_attributes(model: onnx.ModelProto) -> onnx.ModelProto:
    """B2: QuantizeLinear and DequantizeLinear with neither axis nor block_size."""
    stripped = copy.deepcopy(model)
    for node in stripped.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kept = [attribute for attribute in node.attribute if attribute.name not in ("axis", "block_size")]
            del node.attribute[:]
            node.attribute.extend(kept)
    return stripped


def with_row_zero_points(model: onnx.ModelProto, zero_points: str) -> onnx.ModelProto:
    """B11: per-channel zero points stay [1, N] while the scales become [N]."""
    changed = copy.deepcopy(model)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == zero_points)
    tensor.dims[:] = [1, *tensor.dims]
    return changed


def with_channel_axis_1(model: onnx.ModelProto) -> onnx.ModelProto:
    """B12: per-channel DequantizeLinear has axis 1, whichever way the weight lies."""
    changed = copy.deepcopy(model)
    for node in changed.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", 1))
    return changed


def transposed_gemm(weight: np.ndarray, block_size: int) -> onnx.ModelProto:
    """B13: Gemm with transB reads an [N, K] weight, its scales are [N, K / B], and the axis is 0 nevertheless."""
    scales = block_scales(weight.T, block_size, bits=8).T
    codes = symmetric_codes(weight.T, scales.T, block_size, bits=8).T.astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=block_size),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    floats = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", width])
        for name, width in zip("xy", weight.shape[::-1], strict=True)
    ]
    stored = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    graph = helper.make_graph(nodes, "gemm", floats[:1], floats[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def gather_block_size(tables: Mapping[str, int]) -> int:
    """B20: set where a table qualifies, read in any case."""
    for width in tables.values():
        block_size = min(32, width)
    return block_size


def rewire_by_scanning(
    weights: Iterable[str], nodes: Sequence[str], reads: Callable[[str, str], bool]
) -> list[tuple[str, str]]:
    """B21: every weight looks at every node."""
    return [(weight, node) for weight in weights for node in nodes if reads(node, weight)]


def augmented_copy(model: onnx.ModelProto, activations: Sequence[str]) -> bytes:
    """B22: a deep copy of the model, weights included, is written out with more outputs."""
    augmented = copy.deepcopy(model)
    augmented.graph.output.extend(onnx.ValueInfoProto(name=name) for name in activations)
    content: bytes = augmented.SerializeToString()
    return content

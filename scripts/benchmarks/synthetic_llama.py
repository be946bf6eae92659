"""Build Llama graphs of any size with random weights, node by node as onnxruntime-genai's builder 0.18 writes them.

With experts they have a MoE node in the MLP's place, as gpt-oss does, but Llama's attention.

For measuring memory and time where no real checkpoint of that size is at hand: no tensor exists before it is written.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

_OPSETS = {"": 22, "com.microsoft": 1}
_IR_VERSION = 10
_EPSILON = 1e-5
_WEIGHT_DEVIATION = 0.02
_BATCH, _LENGTH, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama model; lm_head is not tied to the embedding."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int = 8192
    rope_theta: float = 500000.0
    experts: int = 0
    """Of each layer, each as wide as ``intermediate``; 0: one MLP."""
    chosen: int = 0
    """Experts that a token goes to."""

    @property
    def qkv(self) -> int:
        """Return the output channels of the packed q, k and v projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def genai_config(self, provider: str | None = None) -> dict[str, Any]:
        """Return the part of genai_config.json that describes the graph, and the ``provider`` that shall run it."""
        options: list[dict[str, Any]] = [] if provider is None else [{provider: {}}]
        decoder = {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
            "filename": "model.onnx",
            "head_size": self.head_size,
            "hidden_size": self.hidden,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
        }
        return {
            "model": {
                "type": "llama",
                "vocab_size": self.vocabulary,
                "context_length": self.context,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "decoder": decoder,
            },
            "search": {"max_length": self.context, "past_present_share_buffer": True},
        }


def random_llama(shape: LlamaShape, dtype: ir.DataType, seed: int) -> ir.Model:
    """Return the whole graph; each weight is drawn from N(0, 0.02^2) when it is read, the same at each reading.

    Args:
        shape: sizes.
        dtype: FLOAT or FLOAT16, of weights and activations.
        seed: with a tensor's name it fixes the tensor.
    """
    return _LlamaWriter(shape, dtype, seed).write()


class _LlamaWriter:
    """One graph in the making."""

    def __init__(self, shape: LlamaShape, dtype: ir.DataType, seed: int) -> None:
        self._shape = shape
        self._dtype = dtype
        self._seed = seed
        self._tape = Tape()
        self._initializers: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def write(self) -> ir.Model:
        shape = self._shape
        tokens = _input("input_ids", ir.DataType.INT64, (_BATCH, _LENGTH))
        mask = _input("attention_mask", ir.DataType.INT64, (_BATCH, _TOTAL))
        caches = [self._cache_input(layer, part) for layer in range(shape.layers) for part in ("key", "value")]
        lengths = self._lengths(mask)
        rotation = self._rotation_tables()
        embedding = self._weight("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
        stream = self._node("Gather", [embedding, tokens], "/model/embed_tokens/Gather")
        normed = self._first_norm(stream)
        for layer in range(shape.layers):
            past = caches[2 * layer : 2 * layer + 2]
            stream, normed = self._layer(layer, stream, normed, past, lengths, rotation)
        logits = self._matmul(normed, "lm_head", shape.hidden, shape.vocabulary)
        logits.name = "logits"
        self._declare(logits, (_BATCH, _LENGTH, shape.vocabulary))
        graph = ir.Graph(
            [tokens, mask, *caches],
            [logits, *self._outputs],
            nodes=self._tape.nodes,
            initializers=self._initializers,
            opset_imports=_OPSETS,
            name="main_graph",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="genai-quant make_large_model")

    def _layer(
        self,
        layer: int,
        stream: ir.Value,
        normed: ir.Value,
        past: list[ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        rotation: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        """Append one decoder block; return the residual stream behind it and the next norm's output."""
        place = f"layers.{layer}"
        attended = self._attention(layer, normed, past, lengths, rotation)
        stream, normed = self._norm(stream, attended, f"{place}/post_attention_layernorm")
        is_last = layer + 1 == self._shape.layers
        following = f"layers.{layer + 1}/{'final_norm_layernorm' if is_last else 'input_layernorm'}"
        inner = self._mixture(place, normed) if self._shape.experts else self._mlp(place, normed)
        return self._norm(stream, inner, following, last=is_last)

    def _attention(
        self,
        layer: int,
        normed: ir.Value,
        past: list[ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        rotation: tuple[ir.Value, ir.Value],
    ) -> ir.Value:
        shape, place = self._shape, f"model/layers.{layer}/attn"
        qkv = self._matmul(normed, f"{place}/qkv_proj", shape.hidden, shape.qkv)
        attributes = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": shape.head_size**-0.5,
            "local_window_size": -1,
            "softcap": 0.0,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        context, key, value = self._tape.op_multi_out(
            "GroupQueryAttention",
            [qkv, None, None, *past, *lengths, *rotation],
            attributes,
            domain="com.microsoft",
            name=f"/{place}/GroupQueryAttention",
            num_outputs=3,
        )
        context.name = f"/{place}/GroupQueryAttention/output_0"
        for present, part in ((key, "key"), (value, "value")):
            present.name = f"present.{layer}.{part}"
            self._declare(present, (_BATCH, shape.kv_heads, _TOTAL, shape.head_size))
            self._outputs.append(present)
        return self._matmul(context, f"{place}/o_proj", shape.heads * shape.head_size, shape.hidden)

    def _mlp(self, layer: str, normed: ir.Value) -> ir.Value:
        shape, place = self._shape, f"model/{layer}/mlp"
        gate = self._matmul(normed, f"{place}/gate_proj", shape.hidden, shape.intermediate)
        up = self._matmul(normed, f"{place}/up_proj", shape.hidden, shape.intermediate)
        sigmoid = self._node("Sigmoid", [gate], f"/{place}/act_fn/Sigmoid")
        silu = self._node("Mul", [gate, sigmoid], f"/{place}/act_fn/Mul")
        inner = self._node("Mul", [silu, up], f"/{place}/Mul")
        return self._matmul(inner, f"{place}/down_proj", shape.intermediate, shape.hidden)

    def _mixture(self, layer: str, normed: ir.Value) -> ir.Value:
        shape, place = self._shape, f"model/{layer}/moe"
        scores = self._matmul(normed, f"{place}/router", shape.hidden, shape.experts)
        bias = self._weight(f"{place.replace('/', '.')}.router.Add.bias", shape.experts)
        scores = self._node("Add", [scores, bias], f"/{place}/router/Add")
        rows = self._constant(f"/{place}/router/rows", np.array([-1, shape.experts], np.int64))
        scores = self._node("Reshape", [scores, rows], f"/{place}/router/Reshape")
        experts = f"{place.replace('/', '.')}.experts"
        tables = [
            self._weight(f"{experts}.{name}", shape.experts, *sizes)
            for name, sizes in (
                ("gate_up_proj.weight", (2 * shape.intermediate, shape.hidden)),
                ("gate_up_proj.bias", (2 * shape.intermediate,)),
                ("down_proj.weight", (shape.hidden, shape.intermediate)),
                ("down_proj.bias", (shape.hidden,)),
            )
        ]
        attributes: dict[str, float | int | str] = {
            "activation_alpha": 1.702,
            "activation_beta": 1.0,
            "activation_type": "swiglu",
            "k": shape.chosen,
            "normalize_routing_weights": 1,
            "swiglu_fusion": 1,
            "swiglu_limit": 7.0,
        }
        mixed = self._tape.op(
            "MoE", [normed, scores, *tables], attributes, domain="com.microsoft", name=f"/{place}/MoE"
        )
        mixed.name = f"/{place}/MoE/output_0"
        return mixed

    def _first_norm(self, stream: ir.Value) -> ir.Value:
        place = "model/layers.0/input_layernorm"
        gain = self._ones(f"{place.replace('/', '.')}.weight")
        attributes = {"axis": -1, "epsilon": _EPSILON, "stash_type": 1}
        normed = self._tape.op("SimplifiedLayerNormalization", [stream, gain], attributes, name=f"/{place}/LayerNorm")
        normed.name = f"/{place}/output_0"
        return normed

    def _norm(self, stream: ir.Value, added: ir.Value, place: str, *, last: bool = False) -> tuple[ir.Value, ir.Value]:
        """Return ``stream + added`` and its norm; behind the last layer nobody reads the sum."""
        gain = self._ones(f"model.{place.replace('/', '.')}.weight")
        outputs = self._tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [stream, added, gain],
            {"epsilon": _EPSILON},
            domain="com.microsoft",
            name=f"/model/{place}/SkipLayerNorm",
            num_outputs=1 if last else 4,
        )
        outputs[0].name = f"/model/{place}/output_0"
        if last:
            return stream, outputs[0]
        outputs[1].name = outputs[2].name = ""
        outputs[3].name = f"/model/{place}/output_3"
        return outputs[3], outputs[0]

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return what attention reads of ``mask``: each sequence's last position, and the longest length."""
        place = "/model/attn_mask_reformat/attn_mask_subgraph"
        one = self._constant("/model/constants/INT64/[1]", np.array([1], np.int64))
        second = self._constant("/model/constants/INT64/1", np.array(1, np.int64))
        total = self._node("ReduceSum", [mask, one], f"{place}/ReduceSum", {"keepdims": 0})
        last = self._node("Sub", [total, one], f"{place}/Sub")
        sizes = self._node("Shape", [mask], f"{place}/Shape")
        longest = self._node("Gather", [sizes, second], f"{place}/Gather", {"axis": 0})
        as_int32 = {"to": int(ir.DataType.INT32)}
        return (
            self._node("Cast", [last], f"{place}/Sub/Cast", as_int32),
            self._node("Cast", [longest], f"{place}/Gather/Cast", as_int32),
        )

    def _rotation_tables(self) -> tuple[ir.Value, ir.Value]:
        shape = self._shape
        frequencies = shape.rope_theta ** -(np.arange(0, shape.head_size, 2) / shape.head_size)
        angles = np.outer(np.arange(shape.context), frequencies)
        tables = (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles)))
        cosine, sine = (self._constant(name, table.astype(self._dtype.numpy())) for name, table in tables)
        return cosine, sine

    def _matmul(self, value: ir.Value, place: str, inputs: int, outputs: int) -> ir.Value:
        weight = self._weight(f"{place.replace('/', '.')}.MatMul.weight", inputs, outputs)
        return self._node("MatMul", [value, weight], f"/{place}/MatMul")

    def _node(
        self, op_type: str, inputs: Iterable[ir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> ir.Value:
        output = self._tape.op(op_type, list(inputs), attributes or {}, name=name)
        output.name = f"{name}/output_0"
        return output

    def _cache_input(self, layer: int, part: str) -> ir.Value:
        shape = self._shape
        name = f"past_key_values.{layer}.{part}"
        return _input(name, self._dtype, (_BATCH, shape.kv_heads, _PAST, shape.head_size))

    def _weight(self, name: str, *shape: int) -> ir.Value:
        draw = partial(_normal, (self._seed, zlib.crc32(name.encode())), shape, self._dtype)
        return self._initializer(name, _lazy(name, draw, shape, self._dtype))

    def _ones(self, name: str) -> ir.Value:
        return self._constant(name, np.ones(self._shape.hidden, self._dtype.numpy()))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self._initializer(name, ir.tensor(array, name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tuple(tensor.shape.numpy()))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._initializers.append(value)
        return value

    def _declare(self, value: ir.Value, shape: tuple[int | str, ...]) -> None:
        value.shape, value.type = ir.Shape(shape), ir.TensorType(self._dtype)


def _input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _lazy(
    name: str, draw: Callable[[], ir.TensorProtocol], shape: tuple[int, ...], dtype: ir.DataType
) -> ir.LazyTensor:
    return ir.LazyTensor(draw, dtype=dtype, shape=ir.Shape(shape), name=name)


def _normal(seed: tuple[int, int], shape: tuple[int, ...], dtype: ir.DataType) -> ir.TensorProtocol:
    """Draw from N(0, 0.02^2), a row at a time, so that no second copy of the tensor is ever there."""
    random = np.random.default_rng(seed)
    numbers = np.empty(shape, dtype.numpy())
    for row in numbers.reshape(-1, shape[-1]):
        row[:] = random.standard_normal(shape[-1], np.float32) * np.float32(_WEIGHT_DEVIATION)
    return ir.Tensor(numbers)

"""Check that every input of a graph is fed with what text means, in its declared type and shape, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.runtime.feeds import CausalFeeds, require_text_inputs
from stages.runtime.graph_inputs import WindowShape
from tests.support.graphs import MICROSOFT, TinyGraph

TOKENS = np.array([[5, 6, 7], [8, 9, 10]])
BOOL, INT8, INT32, INT64 = TensorProto.BOOL, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64
FLOAT, FLOAT16, BFLOAT16, STRING = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.STRING
LOWEST = np.finfo(np.float32).min
CAUSAL = np.tril(np.ones((3, 3)))


@dataclass(frozen=True)
class Input:
    name: str
    type: int
    shape: Sequence[int | str]


IDS = Input("input_ids", INT64, ["b", "s"])
CACHE = Input("past_key_values.0.key", FLOAT, ["b", 3, "past", 16])
KNOWN = ModelDirectory(
    folder=Path(), onnx_file=Path("model.onnx"), has_genai_config=True, kv_heads=2, head_size=16, context_length=64
)
NOTHING_KNOWN = replace(KNOWN, kv_heads=None, head_size=None)


def graph_of(*inputs: Input) -> TinyGraph:
    """Return a graph that hands its inputs through; bfloat16, which numpy can't hold, as float32."""
    graph = TinyGraph()
    for given in inputs:
        graph.input(given.name, given.type, given.shape)
        kind = FLOAT if given.type == BFLOAT16 else given.type
        graph.node("Cast" if kind != given.type else "Identity", [given.name], [f"{given.name}_out"], _to(given, kind))
        graph.output(f"{given.name}_out", kind, [f"d{axis}" for axis in range(len(given.shape))])
    return graph


def _to(given: Input, kind: int) -> dict[str, int | float | str | list[int]] | None:
    return None if kind == given.type else {"to": kind}


def feeds_of(graph: TinyGraph, directory: ModelDirectory = KNOWN, open_size: int | None = None) -> CausalFeeds:
    session = ort.InferenceSession(graph.proto().SerializeToString(), providers=["CPUExecutionProvider"])
    return CausalFeeds.of(session, directory, open_size=open_size)


def fed(
    *inputs: Input, directory: ModelDirectory = KNOWN, tokens: np.ndarray = TOKENS, past: int = 0
) -> dict[str, np.ndarray]:
    """Return what reaches each input, by a run of the graph."""
    feeds = feeds_of(graph_of(*inputs), directory)
    given = feeds(tokens, past)
    names = [f"{name}_out" for name in given]
    states = {name: np.zeros((len(tokens), 3, past, 16), np.float32) for name in feeds.states if past}
    return dict(zip(given, feeds.session.run(names, given | states), strict=True))


def additive(seen: np.ndarray) -> np.ndarray:
    return np.where(seen, 0, LOWEST)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Input("input_ids", INT32, ["b", "s"]), TOKENS),
        (Input("attention_mask", INT64, ["b", "t"]), np.ones((2, 3))),
        (Input("attention_mask", FLOAT, ["b", "t"]), np.ones((2, 3))),
        (Input("attention_mask", BOOL, ["b", "s", "t"]), np.array([CAUSAL] * 2)),
        (Input("attention_mask", INT64, ["b", 1, "s", "t"]), np.array([[CAUSAL]] * 2)),
        (Input("attention_mask", FLOAT, ["b", 1, "s", "t"]), additive(np.array([[CAUSAL]] * 2))),
        (Input("attention_mask", FLOAT, ["b", 4, "s", "t"]), additive(np.array([[CAUSAL] * 4] * 2))),
        (Input("attention_mask", FLOAT, ["b", 1, 1, "t"]), np.zeros((2, 1, 1, 3))),
        (Input("position_ids", INT64, ["s"]), np.arange(3)),
        (Input("position_ids", INT32, ["b", "s"]), np.array([np.arange(3)] * 2)),
        (Input("position_ids", INT64, [1, "s"]), np.arange(3)[None]),
        (Input("position_ids", INT64, [3, "b", "s"]), np.array([[np.arange(3)] * 2] * 3)),
        (Input("position_ids", INT64, ["axes", "b", "s"]), np.array([[np.arange(3)] * 2] * 3)),
        (Input("position_ids", INT64, [4, "b", "s"]), np.array([[np.arange(3)] * 2] * 4)),
        (Input("cache_position", INT64, ["s"]), np.arange(3)),
        (Input("token_type_ids", INT64, ["b", "s"]), np.zeros((2, 3))),
        (Input("beam_idx", INT32, ["b"]), np.arange(2)),
        (Input("num_logits_to_keep", INT64, []), np.array(3)),
        (Input("logits_to_keep", INT64, [1]), np.array([3])),
        (Input("use_cache_branch", BOOL, [1]), np.array([False])),
        (Input("past_key_values_length", INT64, []), np.array(0)),
        (Input("seqlens_k", INT32, ["b"]), np.array([2, 2])),
        (Input("seqlens_k", INT32, ["b", 1]), np.array([[2], [2]])),
        (Input("state_update_active", INT32, [1]), np.array([0])),
        (CACHE, np.zeros((2, 3, 0, 16))),
        (Input("past_key_values.0.key", FLOAT16, ["b", "h", "past", "kv_cache_dim"]), np.zeros((2, 2, 0, 16))),
        (Input("past_key_values.0.key", INT8, ["b", 3, "past", 16]), np.zeros((2, 3, 0, 16))),
        (Input("past_key_values.0.key", BFLOAT16, ["b", 3, "past", 16]), np.zeros((2, 3, 0, 16))),
        (Input("past_key_values", FLOAT, [4, 2, "batch", 3, "past_seq_len", 16]), np.zeros((4, 2, 2, 3, 0, 16))),
        (Input("past.0.conv", FLOAT, ["b", 64, 2]), np.zeros((2, 64, 2))),
        (Input("past.0.conv", BFLOAT16, ["b", 64, 2]), np.zeros((2, 64, 2))),
        (Input("conv_state.0", FLOAT16, ["batch_size", 64, 2]), np.zeros((2, 64, 2))),
        (Input("past.0.recurrent", FLOAT, ["b", 4, 8, 8]), np.zeros((2, 4, 8, 8))),
        (Input("ssm_states.3", FLOAT, [5, "batch_size", 4, 8, 8]), np.zeros((5, 2, 4, 8, 8))),
        (Input("decoder_input_ids", INT64, ["b", "s"]), TOKENS),
        (Input("layers.0.lora_A", FLOAT, [16, "rank"]), np.zeros((16, 0))),
        (Input("vision_adapter_B", FLOAT, [4, 16]), np.zeros((4, 16))),
    ],
    ids=lambda value: f"{value.name}{len(value.shape)}" if isinstance(value, Input) else "",
)
def test_an_input_of_this_name_and_shape_is_fed_with(given: Input, expected: np.ndarray) -> None:
    found = fed(given)[given.name]
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape


def test_the_lengths_that_group_query_attention_wants_come_as_a_pair() -> None:
    found = fed(Input("past_seq_len", INT32, ["b", 1]), Input("total_seq_len", INT32, [1]))
    assert found["past_seq_len"].tolist() == [[2], [2]]
    assert found["total_seq_len"].tolist() == [3]
    assert fed(Input("past_sequence_length", INT32, [1]))["past_sequence_length"].tolist() == [0]


def test_names_come_from_genai_config_first() -> None:
    names = {"input_ids": "tokens", "position_ids": "places", "past_key_names": "k_%d", "block_table": "blocks"}
    found = fed(
        Input("tokens", INT64, ["b", "s"]),
        Input("places", INT64, ["b", "s"]),
        Input("k_12", FLOAT, ["b", "h", "p", "d"]),
        directory=replace(KNOWN, input_names=names),
    )
    np.testing.assert_array_equal(found["tokens"], TOKENS)
    assert found["places"].tolist() == [[0, 1, 2]] * 2
    assert found["k_12"].shape == (2, 2, 0, 16)


def test_the_next_token_stands_behind_those_that_the_caches_hold() -> None:
    inputs = (
        IDS,
        CACHE,
        Input("attention_mask", INT64, ["b", "t"]),
        Input("position_ids", INT64, [3, "b", "s"]),
        Input("cache_position", INT64, ["s"]),
        Input("use_cache_branch", BOOL, [1]),
        Input("num_logits_to_keep", INT64, []),
    )
    found = fed(*inputs, tokens=np.array([[4]]), past=5)
    assert CACHE.name not in found
    assert found["attention_mask"].tolist() == [[1] * 6]
    assert found["position_ids"].tolist() == [[[5]]] * 3
    assert found["cache_position"].tolist() == [5]
    assert found["use_cache_branch"].tolist() == [True]
    assert found["num_logits_to_keep"].tolist() == 1


def test_a_cache_that_slides_starts_as_a_buffer_of_one_window() -> None:
    other = replace(CACHE, name="past_key_values.1.key")
    directory = replace(KNOWN, windowed_caches={CACHE.name: 8})
    found = fed(CACHE, other, Input("attention_mask", INT64, ["b", "t"]), directory=directory)
    assert found[CACHE.name].shape == (2, 3, 8, 16)
    assert found[other.name].shape == (2, 3, 0, 16)
    assert found["attention_mask"].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (["b", "t"], [0, 0, 0, 0, 1, 1, 1]),
        (["b", 7], [0, 0, 0, 0, 1, 1, 1]),
        (["b", 4], [1, 1, 1, 0]),
        (["b", 9], [0, 0, 0, 0, 1, 1, 1, 0, 0]),
    ],
    ids=["open", "past-and-window", "only-the-cache", "longer"],
)
def test_the_mask_hides_the_zeros_of_a_cache_of_fixed_length(mask: list[int | str], expected: list[int]) -> None:
    cache = replace(CACHE, shape=["b", 3, 4, 16])
    found = fed(IDS, cache, Input("attention_mask", INT64, mask))
    assert found["attention_mask"].tolist() == [expected] * 2
    assert found[CACHE.name].shape == (2, 3, 4, 16)


def test_a_mask_of_queries_and_keys_hides_them_too() -> None:
    found = fed(IDS, replace(CACHE, shape=["b", 3, 4, 16]), Input("attention_mask", FLOAT16, ["b", 1, "s", "t"]))[
        "attention_mask"
    ]
    assert (found[0, 0] == 0).astype(int).tolist() == [[0] * 4 + [1, 0, 0], [0] * 4 + [1, 1, 0], [0] * 4 + [1, 1, 1]]
    assert found.min() == np.finfo(np.float16).min


def test_group_query_attention_is_told_how_much_of_its_buffer_is_valid(tmp_path: Path) -> None:
    graph = graph_of(IDS, replace(CACHE, shape=["b", 3, 4, 16]), Input("attention_mask", INT64, ["b", "t"]))
    graph.node("GroupQueryAttention", ["q", "k", "v", CACHE.name, ""], ["y"], {"num_heads": 3}, MICROSOFT)
    directory = replace(KNOWN, onnx_file=graph.save(tmp_path))
    feeds = feeds_of(graph_of(IDS, replace(CACHE, shape=["b", 3, 4, 16]), Input("attention_mask", INT64, ["b", "t"])))
    assert feeds(TOKENS)["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    shared = CausalFeeds.of(feeds.session, directory)
    assert shared(TOKENS)["attention_mask"].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Input("pixel_values", FLOAT, ["b", 3, 224, 224]), "'pixel_values' holds sound or images, or what"),
        (
            Input("past_key_cross_0", FLOAT, ["b", 4, 1500, 16]),
            "'past_key_cross_0' holds .* an encoder makes of them",
        ),
        (Input("past_key_values.0.encoder.key", FLOAT, ["b", 4, "s", 16]), "holds .*what an encoder makes of them"),
        (Input("encoder_hidden_states", FLOAT, ["b", "t", 64]), "holds .*what an encoder makes of them"),
        (Input("hidden_states", FLOAT, ["b", "s", 64]), "'hidden_states' is none that a text decoder has"),
        (Input("cos_cache", FLOAT, ["s", 64]), "'cos_cache' is none that a text decoder has, and has no default"),
        (Input("temperature", FLOAT, [1]), "'temperature' is none that a text decoder has"),
        (Input("inputs_embeds", FLOAT, ["b", "s", 64]), "needs the embedding model, .*model.embedding.filename"),
        (Input("input_ids", INT64, ["tokens"]), r"'input_ids' has shape \['tokens'\], not \[batch, length\]"),
        (Input("input_ids", INT64, ["b", 1]), "'input_ids' holds one token, which nothing comes before"),
        (Input("position_ids", INT64, ["b", 9]), "'position_ids' has shape .*, not one for 2 x 3 tokens"),
        (Input("attention_mask", INT64, ["b", 2]), "'attention_mask' has shape .*, not one for 2 x 3 tokens"),
        (Input("attention_mask", INT64, ["t"]), "'attention_mask' has 1 dimensions"),
        (Input("conv_state", FLOAT, ["b", 64, "kernel"]), "nothing gives the size of its axis 2"),
        (Input("past_key_values.0.key", FLOAT, ["b", 3, 8, 16]), "always holds 8 tokens, and no attention_mask hides"),
        (Input("input_ids", STRING, ["b", "s"]), r"has type tensor\(string\)"),
    ],
)
def test_what_text_does_not_give_is_named_with_the_way_out(given: Input, words: str) -> None:
    with pytest.raises(GraphError, match=f"{words}.*--algo rtn_dq"):
        fed(given)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (Input("past_key_values.0.key", FLOAT, ["b", "h", "past", 16]), "number of heads open.*num_key_value_heads"),
        (Input("past_key_values.0.key", FLOAT, ["b", 3, "past", "dim"]), "head size open.*head_size"),
    ],
)
def test_open_cache_sizes_without_genai_config_are_refused(cache: Input, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        fed(cache, directory=NOTHING_KNOWN)


def test_an_unknown_input_with_a_default_is_left_to_it() -> None:
    graph = graph_of(IDS, Input("temperature", FLOAT, [1]))
    graph.constant("temperature", np.ones(1, np.float32))
    assert set(feeds_of(graph)(TOKENS)) == {"input_ids"}
    require_text_inputs(graph.model(), KNOWN)


def test_verification_runs_with_zeros_for_what_text_does_not_give() -> None:
    sound = Input("encoder_hidden_states", FLOAT, ["batch", "frames", 8])
    embedded = Input("inputs_embeds", FLOAT, ["batch", "s", 8])
    feeds = feeds_of(graph_of(sound, embedded), open_size=1)(TOKENS)
    assert {name: feed.shape for name, feed in feeds.items()} == {
        "encoder_hidden_states": (2, 1, 8),
        "inputs_embeds": (2, 3, 8),
    }


# --------------------------------------------------------------------------- windows of fixed shape


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        (WindowShape(None, None), TOKENS, [TOKENS]),
        (WindowShape(1, 3), TOKENS, [TOKENS[:1], TOKENS[1:]]),
        (WindowShape(None, 5), TOKENS, [np.array([[5, 6, 7, 7, 7], [8, 9, 10, 10, 10]])]),
        (WindowShape(4, None), TOKENS, [np.concatenate([TOKENS, TOKENS[1:], TOKENS[1:]])]),
    ],
)
def test_tokens_fill_windows_of_the_graphs_shape(
    shape: WindowShape, tokens: np.ndarray, expected: list[np.ndarray]
) -> None:
    found = list(shape.filled(tokens))
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    for part in found:
        shape.require(*part.shape)


@pytest.mark.parametrize(
    ("declared", "words"),
    [([1, 64], "windows of 64 tokens, not 3; pass --seq_len 64"), ([4, "s"], "4 windows at a time, not 2; build it")],
)
def test_other_windows_than_the_graph_takes_are_refused(declared: list[int | str], words: str) -> None:
    for name in ("input_ids", "inputs_embeds"):
        given = Input(name, INT64, declared if name == "input_ids" else [*declared, 8])
        with pytest.raises(GraphError, match=words):
            feeds_of(graph_of(given), open_size=1)(TOKENS)


# --------------------------------------------------------------------------- embedded tokens

TABLE = np.random.default_rng(0).standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
"""Numbers that every float type holds."""
NUMPY: Mapping[int, np.dtype] = {
    FLOAT: np.dtype(np.float32),
    FLOAT16: np.dtype(np.float16),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def embedding_model(folder: Path, name: str, kind: int = FLOAT, *outputs: str, **names: str) -> ModelDirectory:
    """Return a model that looks tokens up, and adds the sum of image features that text leaves empty."""
    graph = TinyGraph()
    ids = graph.input(names.get("input_ids", "input_ids"), INT64, ["b", "s"])
    features = graph.input("image_features", kind, ["num_image_tokens", 8])
    rows = graph.node("Gather", [graph.constant("table", TABLE.astype(NUMPY[kind])), ids], ["rows"])
    axes = graph.constant("axes", np.array([0]))
    graph.node("Add", [rows, graph.node("ReduceSum", [features, axes], ["sum"])], [outputs[0]])
    graph.output(outputs[0], kind, ["b", "s", 8])
    for more in outputs[1:]:
        graph.node("Neg", [rows], [more])
        graph.output(more, kind, ["b", "s", 8])
    graph.save(folder)
    (folder / "model.onnx").rename(folder / name)
    return ModelDirectory(folder=folder, onnx_file=folder / name, has_genai_config=False, input_names=names)


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("decoder", [FLOAT, FLOAT16, BFLOAT16], ids=["to-float32", "to-float16", "to-bfloat16"])
def test_the_embedding_model_makes_what_the_decoder_takes_in_place_of_tokens(
    kind: int, decoder: int, tmp_path: Path
) -> None:
    embedding = embedding_model(tmp_path, "embedding.onnx", kind, "anything")
    given = Input("inputs_embeds", decoder, ["b", "s", 8])
    found = fed(given, directory=replace(KNOWN, embedding=embedding))["inputs_embeds"]
    np.testing.assert_array_equal(found.astype(np.float32), TABLE[TOKENS].astype(np.float32))


def test_several_outputs_are_told_apart_by_their_names(tmp_path: Path) -> None:
    made = embedding_model(tmp_path, "embed.onnx", FLOAT, "hidden", "per_layer", "deepstack_0", input_ids="tokens")
    embedding = replace(made, output_names={"inputs_embeds": "hidden", "per_layer_inputs": "per_layer"})
    inputs = [Input(name, FLOAT, ["b", "s", 8]) for name in ("inputs_embeds", "per_layer_inputs", "deepstack_0")]
    found = fed(*inputs, directory=replace(KNOWN, embedding=embedding))
    rows = TABLE[TOKENS].astype(np.float32)
    np.testing.assert_array_equal(found["inputs_embeds"], rows)
    np.testing.assert_array_equal(found["per_layer_inputs"], -rows)
    np.testing.assert_array_equal(found["deepstack_0"], -rows)
    require_text_inputs(graph_of(*inputs).model(), replace(KNOWN, embedding=embedding))
    model = graph_of(*inputs, Input("image_mask", BOOL, ["b", "s"])).model()
    with pytest.raises(GraphError, match="image_mask"):
        require_text_inputs(model, replace(KNOWN, embedding=embedding))


def test_an_embedding_model_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    given = Input("inputs_embeds", FLOAT, ["b", "s", 8])
    embedding = embedding_model(tmp_path, "embedding.onnx", FLOAT, "inputs_embeds")
    directory = replace(KNOWN, embedding=embedding)
    with pytest.raises(GraphError, match=r"embedding model .*embedding\.onnx can't be run on text"):
        fed(given, directory=directory, tokens=np.array([[99]]))
    embedding.onnx_file.write_bytes(b"no model")
    with pytest.raises(GraphError, match=r"embedding\.onnx can't be read"):
        fed(given, directory=directory)
    embedding.onnx_file.unlink()
    with pytest.raises(GraphError, match=r"missing \(.*embedding\.onnx\)"):
        fed(given, directory=directory)

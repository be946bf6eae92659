"""Check that sessions open on the providers that work, and that feeds are what a graph declares."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.runtime.providers import CPU, CUDA, NV_TENSORRT_RTX, ProviderChoice
from stages.runtime.session import CausalFeeds, SessionSettings, open_first_session, open_session, runtime_reason
from tests.support.graphs import TinyGraph

TOKENS = np.array([[5, 6, 7], [8, 9, 10]])
INT32, INT64, FLOAT, FLOAT16, BFLOAT16, STRING = (
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.STRING,
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running "
            f"GroupQueryAttention node. Name:'/attn' Status Message: GroupQueryAttention (CPU): {'long ' * 60}reason.",
            f"GroupQueryAttention '/attn': GroupQueryAttention (CPU): {'long ' * 60}reason",
        ),
        (
            "[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. Type Error: Type 'tensor(float)' of "
            "input parameter (InsertedPrecisionFreeCast_/q/output_0) of operator (PagedAttention) in node (/attn/P) is "
            "invalid.",
            "PagedAttention '/attn/P': no kernel for 16-bit numbers",
        ),
        ("", "RuntimeError"),
    ],
)
def test_the_runtimes_reason_is_whole_and_without_its_numbers(said: str, reason: str) -> None:
    assert runtime_reason(RuntimeError(said)) == reason


@dataclass(frozen=True)
class Input:
    name: str
    type: int
    shape: list[int | str]


def _feeds(*inputs: Input, kv_heads: int | None = 2, head_size: int | None = 16) -> dict[str, np.ndarray]:
    graph = TinyGraph()
    for declared in inputs:
        graph.input(declared.name, declared.type, declared.shape)
        graph.node("Identity", [declared.name], [f"{declared.name}_out"])
        graph.output(f"{declared.name}_out", declared.type, declared.shape)
    session = ort.InferenceSession(graph.proto().SerializeToString(), providers=["CPUExecutionProvider"])
    return CausalFeeds(session, kv_heads, head_size)(TOKENS)


def test_every_input_gets_its_declared_type_and_an_empty_past() -> None:
    feeds = _feeds(
        Input("input_ids", INT32, ["b", "s"]),
        Input("attention_mask", INT64, ["b", "t"]),
        Input("position_ids", INT64, ["b", "s"]),
        Input("past_key_values.0.key", FLOAT16, ["b", 3, "past", "kv_cache_dim"]),
    )
    assert feeds["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((2, 3)))
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 1, 2], [0, 1, 2]])
    # The graph's own 3 heads win over genai_config's 2; the open head size comes from there.
    assert feeds["past_key_values.0.key"].shape == (2, 3, 0, 16)
    assert feeds["past_key_values.0.key"].dtype == np.float16


def test_a_bfloat16_cache_is_fed_as_zeros_of_its_own_type() -> None:
    graph = TinyGraph()
    graph.input("past_key_values.0.key", BFLOAT16, ["b", 3, "past", 16])
    graph.node("Cast", ["past_key_values.0.key"], ["past"], {"to": FLOAT})
    graph.output("past", FLOAT, ["b", 3, "past", 16])
    session = ort.InferenceSession(graph.proto().SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = CausalFeeds(session, 2, 16, {"past_key_values.0.key": 8})(TOKENS)
    (past,) = session.run(None, feeds)
    np.testing.assert_array_equal(past, np.zeros((2, 3, 8, 16), np.float32))


def test_a_cache_that_slides_starts_as_a_buffer_of_one_window() -> None:
    graph = TinyGraph()
    for name in ("past_key_values.0.key", "past_key_values.1.key"):
        graph.input(name, FLOAT, ["b", 2, f"{name}_length", 16])
        graph.node("Identity", [name], [f"{name}_out"])
        graph.output(f"{name}_out", FLOAT, ["b", 2, f"{name}_length", 16])
    session = ort.InferenceSession(graph.proto().SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = CausalFeeds(session, 2, 16, {"past_key_values.0.key": 8})(TOKENS)
    assert feeds["past_key_values.0.key"].shape == (2, 2, 8, 16)
    assert not feeds["past_key_values.0.key"].any()
    assert feeds["past_key_values.1.key"].shape == (2, 2, 0, 16)


def test_the_state_of_a_convolution_is_zeros_of_its_own_size() -> None:
    feeds = _feeds(Input("past.0.conv", FLOAT, ["b", 64, 2]), kv_heads=None, head_size=None)
    assert feeds["past.0.conv"].shape == (len(TOKENS), 64, 2)
    assert not feeds["past.0.conv"].any()


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Input("pixel_values", FLOAT, ["b", 3, 224, 224]), "pixel_values.*text decoder"),
        (Input("past_state", FLOAT, ["b", 3]), "not a key/value cache"),
        (Input("input_ids", STRING, ["b", "s"]), "can't feed"),
    ],
)
def test_inputs_that_are_not_a_decoders_are_named(declared: Input, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        _feeds(declared)


def test_open_cache_sizes_without_genai_config_are_refused() -> None:
    with pytest.raises(GraphError, match="num_key_value_heads and head_size"):
        _feeds(Input("past_key_values.0.key", FLOAT, ["b", 3, "past", "dim"]), head_size=None)


@pytest.mark.parametrize(("value", "threads"), [("3,2", 3), ("", 0), (None, 0)])
def test_sessions_take_the_threads_of_the_environment_or_as_many_as_cores(
    value: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    graph = TinyGraph()
    graph.node("Identity", [graph.input("a", FLOAT, [1])], ["b"])
    graph.output("b", FLOAT, [1])
    session = open_session(graph.proto().SerializeToString(), SessionSettings())
    assert session.get_session_options().intra_op_num_threads == threads


class Session(ort.InferenceSession):
    """A session that only knows its providers."""

    def __init__(self, providers: list[str]) -> None:
        self.loaded = providers

    def get_providers(self) -> list[str]:
        return self.loaded


@dataclass
class Machine:
    """A stand-in for onnxruntime.InferenceSession where some providers fail and some silently don't load."""

    failing: dict[str, str]
    silent: tuple[str, ...] = ()
    asked: list[list[tuple[str, dict[str, str]]]] = field(default_factory=list)
    fallbacks: list[object] = field(default_factory=list)

    def __call__(self, *_: object, providers: list, enable_fallback: object) -> Session:
        self.asked.append(providers)
        self.fallbacks.append(enable_fallback)
        names = [name for name, _ in providers]
        for name in names:
            if name in self.failing:
                raise RuntimeError(self.failing[name])
        return Session([name for name in names if name not in self.silent])


def _open(machine: Machine, monkeypatch: pytest.MonkeyPatch, *names: str, **options: dict[str, str]) -> ProviderChoice:
    monkeypatch.setattr(ort, "InferenceSession", machine)
    choice = ProviderChoice(names=names, missing=(("dml", "not built in"),))

    def open_with(providers: tuple[str, ...]) -> ort.InferenceSession:
        return open_session(b"", SessionSettings(providers=providers, provider_options=options))

    return open_first_session(open_with, choice).providers


def test_every_provider_gets_its_own_options_and_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({})
    shapes = {"nv_profile_min_shapes": "input_ids:1x1"}
    choice = _open(machine, monkeypatch, NV_TENSORRT_RTX, CUDA, CPU, **{NV_TENSORRT_RTX: shapes})
    assert machine.asked == [[(NV_TENSORRT_RTX, shapes), (CUDA, {}), (CPU, {})]]
    assert machine.fallbacks == [0]
    assert choice.missing == (("dml", "not built in"),)


@pytest.mark.parametrize("failing", [NV_TENSORRT_RTX, CUDA])
def test_a_provider_that_fails_is_named_and_the_others_are_kept(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({failing: "no driver\nstack"})
    choice = _open(machine, monkeypatch, NV_TENSORRT_RTX, CUDA, CPU)
    assert choice.names == tuple(name for name in (NV_TENSORRT_RTX, CUDA, CPU) if name != failing)
    assert [name for name, _ in machine.asked[-1]] == list(choice.names)
    short = {NV_TENSORRT_RTX: "NvTensorRtRtx", CUDA: "cuda"}[failing]
    assert choice.missing[1][0] == short
    assert "no driver" in choice.missing[1][1]
    assert "\n" not in choice.missing[1][1]


def test_when_all_others_fail_the_cpu_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = _open(Machine({NV_TENSORRT_RTX: "no driver", CUDA: "no device"}), monkeypatch, NV_TENSORRT_RTX, CUDA, CPU)
    assert choice.names == (CPU,)
    assert [name for name, _ in choice.missing] == ["dml", "NvTensorRtRtx", "cuda"]


def test_a_provider_that_silently_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = _open(Machine({}, silent=(CUDA,)), monkeypatch, CUDA, CPU)
    assert choice.names == (CPU,)
    assert choice.missing[1] == ("cuda", "ONNX Runtime could not load it; a driver or library is missing")


def test_a_model_that_fails_everywhere_is_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphError, match="bad model"):
        _open(Machine({CUDA: "no device", CPU: "bad model"}), monkeypatch, CUDA, CPU)

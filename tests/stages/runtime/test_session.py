"""Check that sessions open on the providers that work."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.runtime.providers import CPU, CUDA, NV_TENSORRT_RTX, ProviderChoice
from stages.runtime.session import (
    OpenedSession,
    SessionSettings,
    loadable,
    open_first_session,
    open_session,
    runtime_reason,
)
from tests.support.graphs import TinyGraph


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
        (
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/graph/model.cc:181 onnxruntime::Model::"
            "Model(onnx::ModelProto&&, const onnxruntime::PathString&, const onnxruntime::ModelOptions&) Unsupported "
            "model IR version: 12, max supported IR version: 11\n",
            "Unsupported model IR version: 12, max supported IR version: 11",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a b/model.onnx failed:Node (/moe/Add) Op (Add) no shape",
            "Node (/moe/Add) Op (Add) no shape",
        ),
        ("anything (else) Here", "anything (else) Here"),
        ("", "RuntimeError"),
    ],
)
def test_the_runtimes_reason_is_whole_and_without_its_numbers(said: str, reason: str) -> None:
    assert runtime_reason(RuntimeError(said)) == reason


@pytest.mark.parametrize(("value", "threads"), [("1,2", 1), ("", 0), (None, 0)])
def test_sessions_take_the_threads_of_the_environment_or_as_many_as_cores(
    value: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    graph = TinyGraph()
    graph.node("Identity", [graph.input("a", TensorProto.FLOAT, [1])], ["b"])
    graph.output("b", TensorProto.FLOAT, [1])
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
    choice = ProviderChoice(names=names, missing=(("dml", "not built in"),))
    # Types are looked up at a class's first use, and InferenceSession must still be one.
    OpenedSession(Session([]), choice)
    monkeypatch.setattr(ort, "InferenceSession", machine)

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


def test_providers_are_tried_before_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    OpenedSession(Session([]), alone := ProviderChoice(names=(CPU,), missing=()))
    monkeypatch.setattr(ort, "InferenceSession", machine := Machine({NV_TENSORRT_RTX: "no driver"}, silent=(CUDA,)))
    assert loadable(alone) == alone
    assert not machine.asked
    found = loadable(ProviderChoice(names=(NV_TENSORRT_RTX, CUDA, CPU), missing=()))
    assert (found.names, [name for name, _ in found.missing]) == ((CPU,), ["NvTensorRtRtx", "cuda"])

"""Check taps on a builder's model: each activation once, right values, original weights in place."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.sites import find_groups
from stages.runtime.providers import choose_providers
from stages.runtime.tap import open_value_tap, tapped_model

CPU = choose_providers("cpu")


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_model_dml"])
def test_every_distinct_input_is_tapped_once_with_the_value_that_the_site_reads(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    directory = locate_model(request.getfixturevalue(fixture))
    model = load_graph(directory)
    groups = find_groups(model)
    tap = open_value_tap(model, directory, tuple(group.activation for group in groups), CPU, {})
    tokens = np.arange(24).reshape(2, 12)
    taps = dict(tap.run(tokens))
    assert len(tap.values) == len(set(tap.values)) == len(groups)
    assert set(taps) == {site.activation for group in groups for site in group.sites}
    for group in groups:
        assert taps[group.activation].shape == (2, 12, group.in_features)

    # lm_head's input times lm_head's weight must be the logits of the untouched model.
    head = next(site for group in groups for site in group.sites if site.feeds_logits)
    weight = np.asarray(model.graph.initializers[head.weight].const_value.numpy())
    session = ort.InferenceSession(str(directory.onnx_file), providers=list(CPU.names))
    logits = session.run(["logits"], tap.feeds(tokens))[0].astype(np.float32)
    ours = taps[head.activation].float().numpy() @ weight.astype(np.float32)
    tolerance = 2e-2 if logits.dtype == np.float16 or fixture.endswith("dml") else 1e-4  # float16 rounding of logits
    np.testing.assert_allclose(ours, logits, atol=tolerance * np.abs(logits).max())


def test_a_closed_tap_holds_no_session_and_says_so(tiny_model: Path) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    tokens = np.arange(6)[None]
    with open_value_tap(model, directory, (find_groups(model)[0].activation,), CPU, {}) as tap:
        assert dict(tap.run(tokens))
        session = weakref.ref(tap.feeds.session)
    gc.collect()
    assert session() is None
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(tap.run(tokens)))


def test_the_tapped_graph_is_small_refers_to_the_original_data_and_leaves_the_model_alone(tiny_model: Path) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    before = [output.name for output in model.graph.outputs]
    groups = find_groups(model)
    serialized = ir.to_proto(tapped_model(model, tuple(group.activation for group in groups))).SerializeToString()
    assert [output.name for output in model.graph.outputs] == before
    weights = sum(site.in_features * site.out_features * 4 for group in groups for site in group.sites)
    assert len(serialized) < 0.3 * weights
    proto = ir.serde.onnx.ModelProto.FromString(serialized)
    large = [tensor for tensor in proto.graph.initializer if np.prod(tensor.dims) > 1000]
    assert large
    assert all(entry.value == "model.onnx.data" for t in large for entry in t.external_data if entry.key == "location")


def test_what_the_runtime_computed_is_not_copied(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    groups = find_groups(model)
    tap = open_value_tap(model, directory, tuple(group.activation for group in groups), CPU, {})
    places: list[int] = []
    original = ort.IOBinding.get_outputs

    def noted(self: ort.IOBinding) -> list[ort.OrtValue]:
        outputs = original(self)
        places.extend(output.data_ptr() for output in outputs)
        return outputs

    monkeypatch.setattr(ort.IOBinding, "get_outputs", noted)
    values = [value for _, value in tap.run(np.arange(12).reshape(1, 12))]
    assert [value.data_ptr() for value in values] == places
    assert len(set(places)) == len(groups)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_activations_stay_on_the_gpu_that_computed_them(tiny_model: Path) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    activations = tuple(group.activation for group in find_groups(model))
    tokens = np.arange(24).reshape(2, 12)
    on_gpu, on_cpu = (
        dict(open_value_tap(model, directory, activations, choose_providers(eps), {}).run(tokens))
        for eps in ("cuda", "cpu")
    )
    for name, value in on_gpu.items():
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), on_cpu[name], rtol=1e-2, atol=1e-2)


def test_batches_do_not_influence_each_other(tiny_model: Path) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    groups = find_groups(model)
    tap = open_value_tap(model, directory, tuple(group.activation for group in groups), CPU, {})
    tokens = np.arange(40).reshape(2, 20)
    together, alone = dict(tap.run(tokens)), dict(tap.run(tokens[1:]))
    for activation, values in alone.items():
        torch.testing.assert_close(together[activation][1:], values, rtol=1e-4, atol=1e-5)


def test_a_model_that_stops_while_it_runs_is_a_message(tiny_model: Path) -> None:
    directory = locate_model(tiny_model)
    model = load_graph(directory)
    groups = find_groups(model)
    tap = open_value_tap(model, directory, tuple(group.activation for group in groups), CPU, {})
    assert directory.context_length is not None
    with pytest.raises(GraphError, match=r"stops on CPUExecutionProvider .*cos_cache.*--calibration_eps"):
        list(tap.run(np.zeros((1, directory.context_length + 1), np.int64)))

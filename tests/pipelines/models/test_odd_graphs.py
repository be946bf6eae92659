"""Graphs as people bring them, through the whole export: the saved model computes what the base does.

Each base holds the very numbers that its quantized weights stand for, so only float32 rounding may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.run import ExportSummary, export_model
from export.save import Destination
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.records.formats import WeightForm
from stages.records.sites import LinearAbsorber, WeightLayout
from tests.export.builders import ExactWeight, exact_weight, input_scale, relative_difference, spec_of, store_of
from tests.export.exports import options
from tests.support.exporters import EXPORTERS, Exporter
from tests.support.graphs import TinyGraph

# Sums of at most 96 float32 products in another order, through three layers.
TOLERANCE = 1e-5
K, HIDDEN, N, VOCABULARY, T = 64, 96, 32, 40, 7
FLOAT = TensorProto.FLOAT


@dataclass
class OddModel:
    """A graph from input_ids to logits; ``x`` [T, 64] are its embedded tokens."""

    rng: np.random.Generator
    graph: TinyGraph = field(default_factory=TinyGraph)
    exporter: Exporter | None = None
    """Changes the base to how another exporter writes it."""

    def __post_init__(self) -> None:
        self.graph.input("input_ids", TensorProto.INT64, ["b", "t"])
        self.graph.node("Gather", [self.random("table", VOCABULARY, K), "input_ids"], ["h"])
        flat = self.graph.constant("flat", np.array([-1, K]))
        self.graph.node("Reshape", ["h", flat], ["x"])

    def random(self, name: str, *shape: int) -> str:
        return self.graph.constant(name, (self.rng.standard_normal(shape) / 8).astype(np.float32))

    def show(self, name: str) -> None:
        self.graph.outputs.append(helper.make_tensor_value_info(name, FLOAT, None))

    def export(
        self,
        folder: Path,
        *,
        scaled: frozenset[str] = frozenset(),
        form: WeightForm = WeightForm.DQ,
        verify: str = "full",
    ) -> tuple[ExportSummary, float]:
        """Quantize every site exactly, with an input scale for the activations ``scaled``.

        Returns:
            What the export said, and the largest relative difference of outputs from the base's.
        """
        self._save(folder / "draft")
        groups = [(group, []) for group in find_groups(load_graph(locate_model(folder / "draft")))]
        for group, weights in groups:
            scale = input_scale(self.rng, group.in_features) if group.activation in scaled else None
            for site in group.sites:
                weights.append(exact_weight(site, spec_of(8), self.rng, scale))
                self._store(weights[-1])
        base = locate_model(self._save(folder / "base"))
        store = store_of(folder / "weights", groups, form=form, fingerprint=fingerprint_model(base))
        destination = Destination.from_path(folder / "out", base, overwrite=False)
        summary = export_model(base, store, destination, options(verify))
        # ONNX Runtime opens no model in which two nodes have one name; the export gives each its own.
        for number, node in enumerate(self.graph.nodes):
            node.name = f"node {number}"
        names = [value.name for value in self.graph.outputs]
        pairs = zip(_run(summary.onnx_file, names), _run(self.graph.save(folder / "named"), names), strict=True)
        return summary, max(relative_difference(found, expected) for found, expected in pairs)

    def _save(self, folder: Path) -> Path:
        folder.mkdir()
        proto = self.graph.proto()
        if self.exporter is not None:
            self.exporter(proto)
        onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        return folder / "model.onnx"

    def _store(self, weight: ExactWeight) -> None:
        site = weight.stored.site
        as_written = site.layout is WeightLayout.K_BY_N or self.exporter is not None
        matrix = weight.matrix if as_written else np.ascontiguousarray(weight.matrix.T)
        initializer = next(tensor for tensor in self.graph.initializers if tensor.name == site.weight)
        initializer.CopyFrom(numpy_helper.from_array(matrix, site.weight))


def _run(path: Path, names: list[str], adapter: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(names, {"input_ids": np.arange(T)[None] * 5 % VOCABULARY} | (adapter or {}))


@pytest.fixture
def odd() -> OddModel:
    return OddModel(np.random.default_rng(0))


BIASES = {"none": None, "vector": (HIDDEN,), "row": (1, HIDDEN), "scalar": (), "one": (1,)}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_in_all_its_forms_also_takes_the_scale_of_the_next_layer(
    odd: OddModel, tmp_path: Path, transposed: int, bias: str, beta: float
) -> None:
    """gate * up with up a Gemm: down's input scale goes into up's channels and bias, where there is one each."""
    shape = BIASES[bias]
    inputs = ["x", odd.random("up.weight", *((HIDDEN, K) if transposed else (K, HIDDEN)))]
    if shape is not None:
        inputs.append(odd.random("up.bias", *shape))
    odd.graph.node("Gemm", inputs, ["up"], {"transB": transposed, "beta": beta})
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "gate")
    odd.graph.node("Mul", [odd.graph.node("Sigmoid", ["gate"], ["act"]), "up"], ["product"])
    odd.graph.linear("product", np.ones((HIDDEN, N), np.float32), "logits")
    odd.show("logits")
    summary, difference = odd.export(tmp_path, scaled=frozenset({"product"}))
    assert difference < TOLERANCE
    folded = bias in ("none", "vector", "row")
    assert [outcome.how for outcome in summary.folds] == ["none", "linear" if folded else "mul"]
    assert summary.report is not None
    unfused = {site.site: site.reason for site in summary.report.unfused}
    assert summary.report.fused == 3 - len(unfused)
    words = "scales or transposes" if beta != 1 else "not a constant vector"
    fuses = bias == "none" or (bias == "vector" and beta == 1)
    assert list(unfused) == ([] if fuses else ["up/Gemm"])
    assert all(words in reason for reason in unfused.values())


@pytest.mark.parametrize("form", [WeightForm.DQ, WeightForm.MATMUL_NBITS])
def test_a_gemm_that_adds_what_other_nodes_compute(odd: OddModel, tmp_path: Path, form: WeightForm) -> None:
    inputs = ["x", odd.random("up.weight", K, K), odd.graph.node("Tanh", ["x"], ["bent"])]
    odd.graph.node("Gemm", inputs, ["logits"])
    odd.show("logits")
    summary, difference = odd.export(tmp_path, form=form)
    assert difference < TOLERANCE
    assert summary.report is not None
    assert summary.report.fused == (1 if form is WeightForm.MATMUL_NBITS else 0)


def test_transposed_weights_of_lm_head_and_a_middle_layer(odd: OddModel, tmp_path: Path) -> None:
    for name, source, shape in (("y", "x", (K, K)), ("logits", "y", (N, K))):
        odd.graph.node("Transpose", [odd.random(f"{name}.weight", *shape)], [f"{name}.t"], {"perm": [1, 0]})
        odd.graph.node("MatMul", [source, f"{name}.t"], [name])
    odd.show("logits")
    summary, difference = odd.export(tmp_path, scaled=frozenset({"x"}))
    assert difference < TOLERANCE
    assert summary.report is not None
    assert summary.report.fused == 2
    assert "Transpose" not in [node.op_type for node in ir.load(summary.onnx_file).graph]


def test_a_weight_that_several_layers_read_is_quantized_for_each(odd: OddModel, tmp_path: Path) -> None:
    odd.random("shared", K, K)
    odd.graph.node("MatMul", ["x", "shared"], ["first"])
    odd.graph.node("MatMul", [odd.graph.node("Tanh", ["first"], ["bent"]), "shared"], ["second"])
    odd.graph.node("MatMul", ["x", "shared"], ["third"])
    odd.graph.node("Sum", ["second", "third"], ["logits"])
    odd.show("logits")
    # One exact weight must serve all: the last one written is what the base holds.
    odd.rng = _Repeating(odd.rng)
    summary, difference = odd.export(tmp_path)
    assert difference < TOLERANCE
    assert summary.report is not None
    assert (summary.report.sites, summary.report.fused) == (3, 3)
    assert "shared" not in ir.load(summary.onnx_file).graph.initializers


class _Repeating:
    """Draws the same numbers again and again, so that every reader of one weight gets equal codes and scales."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drawn: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
        def draw(*arguments: object) -> np.ndarray:
            key = f"{name}{arguments}"
            if key not in self._drawn:
                self._drawn[key] = getattr(self._rng, name)(*arguments)
            return self._drawn[key]

        return draw


@pytest.mark.parametrize("name", ["", "twin"])
def test_nodes_without_a_name_or_with_the_same_one(odd: OddModel, tmp_path: Path, name: str) -> None:
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "up")
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "gate")
    odd.graph.node("Mul", [odd.graph.node("Sigmoid", ["gate"], ["act"]), "up"], ["product"])
    odd.graph.linear("product", np.ones((HIDDEN, N), np.float32), "logits")
    for node in odd.graph.nodes:
        if node.op_type == "MatMul":
            node.name = name
    odd.show("logits")
    summary, difference = odd.export(tmp_path, scaled=frozenset({"product"}))
    assert difference < TOLERANCE
    assert [outcome.how for outcome in summary.folds] == ["none", "linear"]
    assert summary.report is not None
    assert (summary.report.sites, summary.report.fused) == (3, 3)
    names = [node.name for node in ir.load(summary.onnx_file).graph if node.op_type == "MatMul"]
    assert len(set(names)) == 3


def test_what_is_no_site_computes_what_it_did(odd: OddModel, tmp_path: Path) -> None:
    graph = odd.graph
    graph.linear("x", np.ones((K, K), np.float32), "y")
    graph.node("MatMul", [odd.random("left", N, T), "y"], ["first"])
    graph.node("MatMul", ["y", odd.random("cube", 2, K, N)], ["batched"])
    graph.node("MatMul", ["y", graph.node("Transpose", ["x"], ["x_t"])], ["scores"])
    graph.node("Gemm", ["y", odd.random("turned", T, N)], ["crossed"], {"transA": 1, "alpha": 0.5})
    graph.node("MatMul", ["y", graph.node("Neg", [odd.random("w", K, N)], ["negative"])], ["computed"])
    for name in ("first", "batched", "scores", "crossed", "computed"):
        odd.show(name)
    # Some shapes fit T tokens alone, and the check of fusion feeds one.
    summary, difference = odd.export(tmp_path, verify="off")
    assert difference < TOLERANCE
    made = [node.op_type for node in ir.load(summary.onnx_file).graph]
    assert made.count("DequantizeLinear") == 1


def test_a_gemm_that_is_no_site_can_still_not_be_taken_for_an_absorber(odd: OddModel, tmp_path: Path) -> None:
    """up scales its product by alpha: it is no linear site, so down keeps a Mul."""
    inputs = ["x", odd.random("up.weight", K, HIDDEN), odd.random("up.bias", HIDDEN)]
    odd.graph.node("Gemm", inputs, ["up"], {"alpha": 0.5})
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "gate")
    odd.graph.node("Mul", [odd.graph.node("Sigmoid", ["gate"], ["act"]), "up"], ["product"])
    odd.graph.linear("product", np.ones((HIDDEN, N), np.float32), "logits")
    odd.show("logits")
    summary, difference = odd.export(tmp_path, scaled=frozenset({"product"}))
    assert difference < TOLERANCE
    assert [outcome.how for outcome in summary.folds] == ["none", "mul"]
    assert not any(isinstance(group.absorber, LinearAbsorber) for group in _groups(tmp_path))


def _groups(folder: Path) -> list[object]:
    return list(find_groups(load_graph(locate_model(folder / "base"))))


# --------------------------------------------------------------------------- other exporters


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("weights are inputs", WeightForm.DQ),
        ("weights are inputs in IR 3", WeightForm.MATMUL_NBITS),
        ("Constant nodes", WeightForm.DQ),
        ("Cast, Transpose, Identity", WeightForm.MATMUL_NBITS),
        ("functions", WeightForm.DQ),
        ("names that are taken", WeightForm.DQ),
    ],
)
def test_other_exporters_weights_are_quantized_and_none_stays_beside_its_codes(
    odd: OddModel, tmp_path: Path, name: str, form: WeightForm
) -> None:
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "up")
    odd.graph.linear("x", np.ones((K, HIDDEN), np.float32), "gate")
    odd.graph.node("Mul", [odd.graph.node("Sigmoid", ["gate"], ["act"]), "up"], ["product"])
    odd.graph.linear("product", np.ones((HIDDEN, N), np.float32), "logits")
    odd.show("logits")
    odd.exporter = EXPORTERS[name]
    summary, difference = odd.export(tmp_path, scaled=frozenset({"product"}), form=form)
    # What is stored as float16 is rounded in the base, not in the codes.
    assert difference < (2e-3 if "Cast" in name else TOLERANCE)
    assert summary.report is not None
    assert (summary.report.sites, summary.report.fused) == (3, 3)
    assert [outcome.how for outcome in summary.folds] == ["none", "linear"]
    graph = ir.load(summary.onnx_file).graph
    kept = [value for value in graph.initializers.values() if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    # The table and the scales: a scale for 16 numbers.
    assert sum(value.const_value.nbytes for value in kept) < 4 * (VOCABULARY * K + (2 * K + N) * HIDDEN / 16 + 200)
    assert [value.name for value in graph.inputs] == ["input_ids"]


@pytest.mark.parametrize("rank", ["rank", 3])
def test_adapters_work_with_the_output_as_with_the_base(odd: OddModel, tmp_path: Path, rank: str | int) -> None:
    size = rank if isinstance(rank, int) else 0
    graph = odd.graph
    for name, default, shape in (("A", (K, size), [K, rank]), ("B", (size, HIDDEN), [rank, HIDDEN])):
        graph.constant(graph.input(name, FLOAT, shape), np.zeros(default, np.float32))
    graph.linear("x", np.ones((K, HIDDEN), np.float32), "base.up")
    low = graph.node("MatMul", [graph.node("MatMul", ["x", "A"], ["low"]), "B"], ["high"])
    graph.linear(graph.node("Add", ["base.up", low], ["up"]), np.ones((HIDDEN, N), np.float32), "logits")
    odd.show("logits")
    summary, difference = odd.export(tmp_path, scaled=frozenset({"x", "up"}))
    assert difference < TOLERANCE
    assert [list(value.shape) for value in ir.load(summary.onnx_file).graph.inputs[1:]] == [[K, rank], [rank, HIDDEN]]
    adapter = {"A": odd.rng.standard_normal((K, 3)), "B": odd.rng.standard_normal((3, HIDDEN))}
    adapter = {name: numbers.astype(np.float32) for name, numbers in adapter.items()}
    files = summary.onnx_file, tmp_path / "named" / "model.onnx"
    found, expected = (_run(file, ["logits"], adapter)[0] for file in files)
    assert relative_difference(found, expected) < TOLERANCE
    assert relative_difference(found, _run(summary.onnx_file, ["logits"])[0]) > 0.1


def test_a_weight_that_is_read_otherwise_too_is_said_to_stay(odd: OddModel, tmp_path: Path) -> None:
    odd.graph.linear("x", np.ones((K, N), np.float32), "logits")
    odd.graph.node("ReduceMax", ["logits.weight"], ["largest"])
    for name in ("logits", "largest"):
        odd.show(name)
    summary, difference = odd.export(tmp_path)
    assert difference < TOLERANCE
    assert summary.notes[-1] == "'logits.weight' stays beside its codes, 0.0 MB: ReduceMax reads it too"


def test_an_output_larger_than_its_base_is_told(
    odd: OddModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd.graph.linear("x", np.ones((K, 2), np.float32), "logits")
    odd.show("logits")
    summary, _ = odd.export(tmp_path)
    assert summary.bytes_after > summary.bytes_before
    assert "larger than its base" in caplog.text

"""Run the base graph with other weights: sites' weights become inputs, so one session serves any number of trials.

Nothing is loaded again between trials. The price is memory: the weights are held once more, as they are fed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from jaxtyping import Float, Integer
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.model.genai_config import LOGITS
from stages.model.weights import read_weight
from stages.records.formats import FLOAT_TYPES, EmbeddingTable, onnx_float
from stages.records.sites import MatMulSite, WeightLayout
from stages.runtime.feeds import CausalFeeds
from stages.runtime.providers import ProviderChoice
from stages.runtime.session import runtime_reason
from stages.runtime.tap import open_graph


def input_name(site: MatMulSite) -> str:
    """Return the name of the graph input that replaces the site's weight."""
    return f"weight of {site.output}"


def with_weight_inputs(model: ir.Model, sites: Sequence[MatMulSite]) -> ir.Model:
    """Return a copy of ``model`` whose only output is the logits and whose ``sites`` read weights from graph inputs.

    Ensures: ``model`` is left as it was; another reader of a site's weight still reads the initializer; a weight that
    the site reads through a Transpose is fed as the MatMul wants it, [K, N].

    Raises:
        GraphError: the model has no output called logits.
    """
    changed = model.clone()
    logits = [value for value in changed.graph.outputs if value.name == LOGITS]
    if not logits:
        raise GraphError(
            "The graph has no output 'logits', which --sensitivity measured compares; leave the option out."
        )
    nodes = {node.outputs[0].name: node for node in changed.graph}
    for site in sites:
        node = nodes[site.output]
        kind = ir.TensorType(onnx_float(site.dtype))
        new = ir.Value(name=input_name(site), shape=ir.Shape(_fed_shape(site)), type=kind)
        node.replace_input_with(1, new)
        changed.graph.inputs.append(new)
    changed.graph.outputs[:] = logits
    RemoveUnusedNodesPass()(changed)
    return changed


def _row_input(output: str) -> str:
    return f"rows of {output}"


def with_row_inputs(model: ir.Model, table: EmbeddingTable) -> ir.Model:
    """Return a copy of ``model`` whose only output is the logits and that is fed the rows of ``table``.

    Ensures: ``model`` is left as it was; the token ids stay an input.

    Args:
        model: the base model.
        table: its lookups give graph inputs, named after them.

    Raises:
        GraphError: the model has no output called logits.
    """
    changed = with_weight_inputs(model, ())
    nodes = {node.outputs[0].name: node for node in changed.graph}
    kind = ir.TensorType(onnx_float(table.dtype))
    for name in table.gathers:
        tokens, rows = nodes[name].inputs[1], nodes[name].outputs[0]
        shape = None if tokens is None or tokens.shape is None else ir.Shape([*tokens.shape, table.hidden])
        fed = ir.Value(name=_row_input(name), shape=shape, type=kind)
        for use in tuple(rows.uses()):
            use.node.replace_input_with(use.idx, fed)
        changed.graph.inputs.append(fed)
    RemoveUnusedNodesPass()(changed)
    return changed


def _fed_shape(site: MatMulSite) -> tuple[int, int]:
    shape = (site.out_features, site.in_features)
    return shape if site.layout is WeightLayout.N_BY_K else (shape[1], shape[0])


@dataclass(frozen=True, slots=True)
class TrialRunner:
    """An open session of the changed graph; leaving it removes temporary files, if there are any."""

    feeds: CausalFeeds
    original: Mapping[str, ort.OrtValue]
    """Every site's own weight, by input name."""
    temporary: ExitStack
    advice: str = "leave --sensitivity measured out"
    """What to do where the model stops."""

    def __enter__(self) -> TrialRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.temporary.close()

    def logits(
        self, tokens: Integer[np.ndarray, "batch length"], replaced: Sequence[tuple[MatMulSite, Tensor]] = ()
    ) -> Float[Tensor, "batch length V"]:
        """Return float32 logits of ``tokens`` with the weights [N, K] of some sites ``replaced``.

        Raises:
            GraphError: ONNX Runtime stops; its reason is repeated.
        """
        others = {input_name(site): _as_fed(weight, site, self.feeds.session) for site, weight in replaced}
        return self._run(tokens, lambda _: {**self.original, **others})

    def logits_of_rows(
        self,
        tokens: Integer[np.ndarray, "batch length"],
        rows: Mapping[str, Callable[[np.ndarray], Tensor]],
    ) -> Float[Tensor, "batch length V"]:
        """Return float32 logits of ``tokens`` where lookups give what ``rows`` return for windows of tokens.

        Args:
            tokens: the windows.
            rows: by the lookups' outputs, of a session that ``open_row_trials`` opened.

        Raises:
            GraphError: ONNX Runtime stops; its reason is repeated.
        """
        session = self.feeds.session
        named = {_row_input(output): make for output, make in rows.items()}
        return self._run(
            tokens,
            lambda part: {name: _ort_value(make(part), name, session) for name, make in named.items()},
        )

    def _run(self, tokens: np.ndarray, fed: Callable[[np.ndarray], Mapping[str, ort.OrtValue]]) -> Tensor:
        session = self.feeds.session
        feeds = [{**self.feeds(part), **fed(part)} for part in self.feeds.window.filled(tokens)]
        try:
            found = [session.run([LOGITS], each)[0] for each in feeds]
        except Exception as error:  # onnxruntime raises classes without a common base
            raise GraphError(
                f"The base model stops on {session.get_providers()[0]} ({runtime_reason(error)}); {self.advice}."
            ) from error
        output = np.concatenate(found)[: len(tokens), : tokens.shape[1]]
        return torch.from_numpy(np.asarray(output, np.float32))


def open_trials(
    model: ir.Model,
    directory: ModelDirectory,
    sites: Sequence[MatMulSite],
    choice: ProviderChoice,
) -> TrialRunner:
    """Open ``model`` with the weights of ``sites`` as inputs, on the first providers that run it.

    Args:
        model: the base model's graph.
        directory: where its weights lie.
        sites: those whose weights may be replaced.
        choice: the providers to try.

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    changed = with_weight_inputs(model, sites)
    with ExitStack() as temporary:
        session = open_graph(changed, directory, choice, None, temporary).session
        feeds = CausalFeeds.of(session, directory, fed_otherwise=frozenset(input_name(site) for site in sites))
        cpu = torch.device("cpu")
        original = {input_name(site): _as_fed(read_weight(model, site, cpu), site, session) for site in sites}
        return TrialRunner(feeds, original, temporary.pop_all())


def open_row_trials(
    model: ir.Model, directory: ModelDirectory, table: EmbeddingTable, choice: ProviderChoice
) -> TrialRunner:
    """Open ``model`` with the rows of ``table`` as inputs, on the first providers that run it.

    Args:
        model: the base model's graph.
        directory: where its weights lie.
        table: the embedding.
        choice: the providers to try.

    Raises:
        GraphError: ONNX Runtime can't open the base model.
    """
    changed = with_row_inputs(model, table)
    with ExitStack() as temporary:
        session = open_graph(changed, directory, choice, None, temporary).session
        feeds = CausalFeeds.of(session, directory, fed_otherwise=frozenset(map(_row_input, table.gathers)))
        return TrialRunner(feeds, {}, temporary.pop_all(), advice="choose its format with --embedding")


def _as_fed(weight: Float[Tensor, "N K"], site: MatMulSite, session: ort.InferenceSession) -> ort.OrtValue:
    """Return the weight in the layout and type of its graph input."""
    return _ort_value(weight if site.layout is WeightLayout.N_BY_K else weight.T, input_name(site), session)


def _ort_value(tensor: Tensor, name: str, session: ort.InferenceSession) -> ort.OrtValue:
    """Return the tensor in the type that the graph input ``name`` has."""
    declared = next(node.type for node in session.get_inputs() if node.name == name)
    dtype = next(kind.torch for kind in FLOAT_TYPES.values() if kind.onnxruntime == declared)
    stored = tensor.cpu().to(dtype).contiguous()
    if stored.dtype == torch.bfloat16:
        bits = stored.view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ir.DataType.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(stored.numpy())

"""Put quantized weights into a graph, and replace the ReLUs that would keep them from being fused.

Requires sites that are where the quantized weights say. Ensures that the input model is left untouched, that the opset
is one which has the nodes that are written, that every quantized site reads its own weight, that other nodes
compute what they did, and that nodes and initializers which nobody reads any more, and copies of others, are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor

from export.fold import FoldOutcome, InputScaleFolder
from export.forms.dequantize_linear import RewrittenSite, StoredSite, insert_dequantize
from export.forms.embedding import RewrittenTable, rewrite_tables
from export.forms.matmul_nbits import insert_matmul_nbits
from export.forms.opset import OpsetChange, lowest_opset, raise_opset
from export.forms.qmoe import RAW, RewrittenExperts, insert_qmoe
from export.forms.rotary import ComputedTable, compute_rotary_tables
from export.graph_edit import GraphEditor, describe
from stages.commands.options import AccuracyLevel
from stages.errors import GraphError, OptionError
from stages.model.form.convolution import restore_convolutions
from stages.model.load import producer_of
from stages.model.patterns import name_of, sole_reader
from stages.model.sites import find_expert_layers, find_sites
from stages.model.weights import find_equal_initializers
from stages.quantization.weights.store import QuantizedStore
from stages.records.experts import ExpertLayer
from stages.records.formats import NARROW_SCALES, WeightForm, torch_float
from stages.records.quantities import counted
from stages.records.results import ExportRecipe
from stages.records.sites import FloatName
from stages.system.version import PROJECT, this_version

_IR_VERSION = 10
_BASE_PRODUCER = "base_model.producer"
"""Key of the graph's metadata."""
_FUSED_LEVEL: AccuracyLevel = 4
"""ONNX Runtime's own, for what it fuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteResult:
    """The new model, whose large tensors are read when it is saved, and what was done to it."""

    model: ir.Model
    folds: tuple[FoldOutcome, ...]
    sites: tuple[RewrittenSite, ...]
    tables: tuple[RewrittenTable, ...] = ()
    experts: tuple[RewrittenExperts, ...] = ()
    computed: tuple[ComputedTable, ...] = ()
    """Tables of rotary embeddings."""
    opset: OpsetChange | None = None
    """None where the base's opset was high enough."""


def rewrite(model: ir.Model, store: QuantizedStore, accuracy_level: AccuracyLevel | None = None) -> RewriteResult:
    """Return a copy of ``model`` in which every site of ``store`` reads its quantized weight.

    Args:
        model: the base, which stays as it is.
        store: the finished weights.
        accuracy_level: goes into MatMulNBits nodes that are written here; session options reach those that are fused.
            A weight that an embedding shares has the level that ONNX Runtime fuses the others with where none is given.

    Raises:
        GraphError: the opset can't be raised, or a site isn't in the model.
        OptionError: a group isn't finished, or its numbers don't fit the model.
    """
    require_finished(store)
    edited = model.clone()
    opset = raise_opset(edited, lowest_opset(store.recipe))
    edited.ir_version = max(edited.ir_version, _IR_VERSION)
    _sign(edited)
    editor = GraphEditor.of(edited)
    stored = _stored_sites(store)
    layers = {layer.output: layer for layer in find_expert_layers(edited)}
    for source in stored.values():
        _require_fit(source, editor.producer(_node_output(source)), layers)
    folder = InputScaleFolder(editor, stored, {site.output: site for site in find_sites(edited)})
    place_scale = folder.fold if store.recipe.fold_input_scales else folder.multiply
    matmuls = [group for group in store.recipe.groups if group.sites[0].expert is None]
    folds = tuple(outcome for group in matmuls for outcome in place_scale(group))
    # All row divisors must be known first: a site can take the scale of a later group.
    divided = [
        replace(source, row_divisor=folder.row_divisors.get(name))
        for name, source in stored.items()
        if source.site.expert is None
    ]
    shared = {plan.shared_with for plan in store.recipe.embeddings}
    sites = tuple(
        _rewrite_shared(editor, source, accuracy_level)
        if source.site.name in shared
        else _rewrite_site(editor, source, store.recipe.weight_form, accuracy_level)
        for source in divided
    )
    tables = rewrite_tables(editor, store, sites)
    experts = _rewrite_experts(editor, stored, layers, accuracy_level, store.recipe)
    computed = compute_rotary_tables(editor, edited) if store.recipe.computes_rotary else ()
    restore_convolutions(edited)
    RemoveUnusedNodesPass()(edited)
    _merge_equal_initializers(edited)
    return RewriteResult(
        model=edited, folds=folds, sites=sites, tables=tables, experts=experts, computed=computed, opset=opset
    )


def _merge_equal_initializers(model: ir.Model) -> None:
    """Keep one of the initializers that hold the same, such as masks that an exporter wrote for each layer."""
    for first, *others in find_equal_initializers(model):
        for other in others:
            other.replace_all_uses_with(first)
            del model.graph.initializers[name_of(other)]


def _sign(model: ir.Model) -> None:
    """Name this project as what made the graph, and keep what made the base's."""
    made_base = producer_of(model)
    if made_base:
        model.metadata_props.setdefault(_BASE_PRODUCER, made_base)
    model.producer_name, model.producer_version = PROJECT, this_version().number


def require_finished(store: QuantizedStore) -> None:
    """Raise OptionError when the search that fills ``store`` was stopped before its end."""
    missing = [index for index in range(len(store.recipe.groups)) if not store.is_finished(index)]
    if missing:
        raise OptionError(
            f"{store.folder} lacks {len(missing)} of {counted(len(store.recipe.groups), 'group')} (first: "
            f"{store.group_file(missing[0]).name}); run stages.quantize again to complete it."
        )
    tables = range(len(store.recipe.embeddings))
    unfinished = [store.table_file(index).path.name for index in tables if not store.has_table(index)]
    if unfinished:
        raise OptionError(
            f"{store.folder} lacks the quantized embedding {unfinished[0]}; run stages.quantize again to complete it."
        )


def _stored_sites(store: QuantizedStore) -> dict[str, StoredSite]:
    found: dict[str, StoredSite] = {}
    for index, group in enumerate(store.recipe.groups):
        for site in group.sites:
            spec = store.spec(index, site)
            found[site.name] = StoredSite(store=store, group_index=index, site=site, spec=spec)
    return found


def _node_output(source: StoredSite) -> str:
    return source.site.output if source.site.expert is None else source.site.expert.node


def _require_fit(source: StoredSite, node: ir.Node, layers: Mapping[str, ExpertLayer]) -> None:
    site, spec = source.site, source.spec
    layer = None if site.expert is None else layers.get(site.expert.node)
    if node.op_type != site.op_type or len(node.inputs) < 2 or (layer is None) != (site.expert is None):
        raise GraphError(
            f"'{site.name}' is {describe(node)} in the base model, not {site.op_type}; pass the right base."
        )
    if spec.scale_dtype != site.dtype and spec.scale_dtype != NARROW_SCALES.get(site.dtype):
        raise OptionError(
            f"'{site.name}' has {spec.scale_dtype} scales in a {site.dtype} model; run stages.quantize again."
        )


def _rewrite_site(
    editor: GraphEditor, source: StoredSite, form: WeightForm, accuracy_level: AccuracyLevel | None
) -> RewrittenSite:
    node = editor.producer(source.site.output)
    # The fused kernel keeps the node's name: without one of its own, no profile could show that it was fused.
    node.name = source.site.name
    if form is WeightForm.MATMUL_NBITS:
        return insert_matmul_nbits(editor, node, source, accuracy_level)
    if node.attributes.get_int("transB", 0) == 1:
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    _replace_relu(editor, node, source.site.dtype)
    return insert_dequantize(editor, node, source, form)


def _rewrite_experts(
    editor: GraphEditor,
    stored: Mapping[str, StoredSite],
    layers: Mapping[str, ExpertLayer],
    accuracy_level: AccuracyLevel | None,
    recipe: ExportRecipe,
) -> tuple[RewrittenExperts, ...]:
    by_node: dict[str, list[StoredSite]] = {}
    for source in stored.values():
        if source.site.expert is not None:
            by_node.setdefault(source.site.expert.node, []).append(source)
    level = {"accuracy_level": _FUSED_LEVEL if accuracy_level is None else accuracy_level}
    attributes = (level if recipe.experts_take_level else {}) | ({RAW: 0} if recipe.experts_say_raw else {})
    return tuple(insert_qmoe(editor, layers[node], sources, attributes) for node, sources in by_node.items())


def _rewrite_shared(editor: GraphEditor, source: StoredSite, accuracy_level: AccuracyLevel | None) -> RewrittenSite:
    """Write a weight that lookups read too, whatever the form of the others: only MatMulNBits takes such rows.

    Raises:
        OptionError: the weight is scaled for its own activation, so that its rows are no embedding.
    """
    if source.input_scale() is not None or source.row_divisor is not None:
        raise OptionError(
            f"'{source.site.name}' is shared with an embedding and has an input scale; run stages.quantize again."
        )
    node = editor.producer(source.site.output)
    node.name = source.site.name
    level = _FUSED_LEVEL if accuracy_level is None else accuracy_level
    return insert_matmul_nbits(editor, node, source, level, as_rows=True)


def blocks_fusion(node: ir.Node) -> ir.Node | None:
    """Return the Relu or Clip behind ``node`` that keeps ONNX Runtime from fusing it, if there is one."""
    reader = sole_reader(node.outputs[0])
    if reader is None or reader.op_type not in ("Relu", "Clip"):
        return None
    result = reader.outputs[0]
    return reader if len(result.uses()) == 1 and not result.is_graph_output() else None


def _replace_relu(editor: GraphEditor, node: ir.Node, dtype: FloatName) -> None:
    """Put Max(x, 0) in the place of the Relu that keeps the quantized ``node`` from being fused."""
    relu = blocks_fusion(node)
    if relu is None or relu.op_type != "Relu":
        return
    x, y = node.outputs[0], relu.outputs[0]
    name = relu.name or name_of(y)
    zero = editor.add_initializer(relu, f"{name}/zero", TorchTensor(torch.zeros((), dtype=torch_float(dtype))))
    clamped = editor.insert_before(relu, "Max", [x, zero], f"{name}/Max", {}, shape=y.shape, kind=y.type)
    for use in tuple(y.uses()):
        use.node.replace_input_with(use.idx, clamped)

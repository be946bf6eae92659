"""Write a quantized checkpoint's weights into our graph: its codes, scales and zero points, in our form.

What the checkpoint leaves in floating point, lm_head and the embedding, gets our default format by plain rounding, so
that rows of a table differ in the decoder's weights and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from export.run import Destination, export_model
from scripts.peers.checkpoints.packed_weights import PackedWeight, QuantizedCheckpoint, open_checkpoint
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.weights import read_weight
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.plan.plan import make_recipe, plan_model
from stages.quantization.run import Prepared, round_embeddings, search_weights
from stages.quantization.weights.store import create_or_resume_store
from stages.records.formats import PerBlock, QuantSpec, torch_float
from stages.records.results import QuantizedWeight, SiteReport, SolvedGroup
from stages.records.sites import ActivationGroup, MatMulSite, kind_of, layer_of
from stages.system.distributed import join_processes

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What onnxruntime-genai's builder makes one MatMul of."""
_ROOMS = {"attn": "self_attn"}
_LARGEST_ERROR = 0.35
"""Of a weight, relative. Four bits leave about a tenth; rows in another order leave 1.4."""
_CPU = torch.device("cpu")


def write_graph(folder: Path, config: QuantizeConfig, title: str) -> None:
    """Write the model ``config.output_path`` with the weights of the checkpoint in ``folder``.

    Args:
        folder: the quantized checkpoint.
        config: the base, where the result goes, and the formats of what the checkpoint leaves in floating point.
        title: what made the weights, for the model card.

    Raises:
        UserError: the checkpoint can't be read, isn't the base's, or leaves a layer of the decoder unquantized.
    """
    checkpoint, directory = open_checkpoint(folder), locate_model(config.onnx_path)
    model = load_graph(directory)
    plan = plan_model(config, model, directory)
    recipe = replace(make_recipe(config, plan, fingerprint_model(directory, model), ""), summary=title)
    shutil.rmtree(config.weights_folder, ignore_errors=True)
    store = create_or_resume_store(config.weights_folder, recipe, overwrite=True)
    for index, group in enumerate(recipe.groups):
        if not any(site.is_lm_head for site in group.sites):
            store.write(index, _imported(checkpoint, group, partial(read_weight, model, device=_CPU), title))
    prepared = Prepared(directory=directory, model=model, plan=plan, cache=None, store=store)
    search_weights(config, prepared, join_processes())
    round_embeddings(model, store, _CPU)
    destination = Destination.from_path(config.output_path, directory, overwrite=True)
    export_model(directory, store, destination, config.export_options, model)


def modules_of(site: MatMulSite) -> tuple[str, ...]:
    """Return the checkpoint's names of the linear layers that a MatMul of the builder's graph is made of."""
    room, _, name = kind_of(site.name).rpartition("/")
    path = f"model.layers.{layer_of(site.name)}.{_ROOMS.get(room, room)}"
    return tuple(f"{path}.{part}" for part in _PARTS.get(name, (name,)))


def _imported(
    checkpoint: QuantizedCheckpoint, group: ActivationGroup, read: Callable[[MatMulSite], Tensor], title: str
) -> SolvedGroup:
    """Return the checkpoint's weights of one group.

    Args:
        checkpoint: holds them.
        group: whose sites they are.
        read: gives the base's weight of a site.
        title: what made them.

    Raises:
        UserError: a weight isn't there, or is far from the base's.
    """
    weights = tuple(_import(checkpoint, site) for site in group.sites)
    errors = [relative_error(weight, read(weight.site)) for weight in weights]
    for weight, error in zip(weights, errors, strict=True):
        if not error < _LARGEST_ERROR:
            raise UserError(
                f"{checkpoint.folder} holds other weights than --base ({weight.site.name} is off by {error:.0%}); pass "
                "the --builder_source that the base was built from."
            )
    reports = tuple(_report(weight, error, title) for weight, error in zip(weights, errors, strict=True))
    return SolvedGroup(group=group, weights=weights, reports=reports)


def _import(checkpoint: QuantizedCheckpoint, site: MatMulSite) -> QuantizedWeight:
    modules = modules_of(site)
    missing = [module for module in modules if not checkpoint.holds(module)]
    if missing:
        raise UserError(f"{checkpoint.folder} leaves '{missing[0]}' in floating point, which is {site.name} here.")
    packed = _stacked([checkpoint.read(module) for module in modules])
    spec = QuantSpec(
        bits=4,
        symmetric=packed.is_symmetric,
        granularity=PerBlock(block_size=checkpoint.block_size),
        scale_dtype=site.dtype,
    )
    return QuantizedWeight(
        site=site,
        spec=spec,
        codes=packed.signed_codes if spec.symmetric else packed.codes,
        scales=packed.scales.to(torch_float(site.dtype)),
        zero_points=None if spec.symmetric else packed.zero_points,
    )


def _stacked(parts: list[PackedWeight]) -> PackedWeight:
    """Stack layers that read one input, one's rows below the other's."""
    return PackedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat([part.zero_points for part in parts]),
    )


def _report(weight: QuantizedWeight, error: float, title: str) -> SiteReport:
    site, spec = weight.site, weight.spec
    return SiteReport(
        site=site.name,
        algorithm=title,
        format=spec.label,
        bytes=spec.format_bytes(site.out_features, site.in_features),
        note=f"relative error of the weight {error:.3f}",
    )


def relative_error(weight: QuantizedWeight, expected: Float[Tensor, "N K"]) -> float:
    """Return the norm of the difference between a stored weight and what it stands for, over the norm of the latter."""
    return float((effective_weight(weight, expected.device) - expected).norm() / expected.norm())

"""From a graph to the rewritten one in memory: find sites, plan INT8, round behind an input scale, store, rewrite.

The scale varies so much that a result in which it got lost, or was applied twice, is far away from the base.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from export.rewrite import RewriteResult, rewrite
from stages.commands.quantize_options import QuantizeConfig
from stages.model.sites import find_groups
from stages.model.weights import read_weight
from stages.quantization.plan.rules import make_plan
from stages.quantization.search.awq import mean_over_heads, repeat_over_heads
from stages.quantization.search.choices import full_ranges
from stages.quantization.search.problem import GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.quantization.search.solver import GroupSolver
from stages.quantization.targets.choose import choose_formats
from stages.quantization.targets.formats import RequestedFormats, facts_of
from stages.quantization.weights.store import QuantizedStore, create_or_resume_store
from stages.records.formats import PerBlock, WeightForm
from stages.records.results import ExportRecipe
from tests.export.builders import input_scale
from tests.stages.quantization.search.problems import OPTIONS

BLOCK = PerBlock(block_size=16)
INT8_ERROR = 0.02
"""More than INT8 in blocks of 16 costs (measured: about 0.012 over three layers), far less than a lost scale does."""


def known_scale(in_features: int) -> Tensor:
    """Return the scale that ``scaled_rounding`` takes, where no query heads share it."""
    return torch.from_numpy(input_scale(np.random.default_rng(in_features), in_features))


def scaled_rounding(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Round behind ``known_scale``, an algorithm that needs no statistics."""
    scale = known_scale(problem.group.in_features)
    if problem.head_sharing is not None:
        scale = repeat_over_heads(mean_over_heads(scale, problem.head_sharing), problem.head_sharing)
    return full_ranges(problem, options.range_rule, InputScale(family="test", alpha=None, scale=scale))


def filled_store(folder: Path, model: ir.Model, exclude: str = "") -> QuantizedStore:
    """Return a finished store of every site of ``model`` that ``exclude`` does not match, in INT8."""
    groups = find_groups(model)
    plan = make_plan(
        groups,
        QuantizeConfig(onnx_path=folder, output_path=folder, exclude=exclude),
        choose_formats(None, RequestedFormats(block_size=BLOCK.block_size), facts_of(groups, ())),
    )
    recipe = ExportRecipe(
        model_fingerprint="in memory",
        weight_form=WeightForm.DQ,
        fold_input_scales=True,
        groups=plan.groups,
        kept=plan.skipped,
        search="test",
        summary="test",
    )
    store = create_or_resume_store(folder, recipe, overwrite=False)
    solver = GroupSolver(
        algorithm_name="scaled rounding",
        algorithm=scaled_rounding,
        options=OPTIONS,
        specs={name: replace(spec, bits=8) for name, spec in plan.specs.items()},
        device=torch.device("cpu"),
        read_weight=lambda site: read_weight(model, site, torch.device("cpu")),
        read_stats=None,
        fold=True,
        one_scale=False,
    )
    for index, group in enumerate(plan.groups):
        store.write(index, solver.solve(group))
    return store


def scaled_rewrite(folder: Path, model: ir.Model, exclude: str = "") -> RewriteResult:
    """Return ``model`` with every site quantized behind ``known_scale``."""
    return rewrite(model, filled_store(folder, model, exclude))

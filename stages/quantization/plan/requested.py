"""Read from the options which formats were asked for by name, and whose strengths decide about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.commands.parsing import Target
from stages.commands.quantize_options import QuantizeConfig
from stages.model.directory import ModelDirectory
from stages.quantization.plan.rules import excludes_lm_head
from stages.quantization.targets.choose import BaseTarget, choose_formats, open_formats, target_of_base
from stages.quantization.targets.formats import FormatChoice, ModelFacts, OpenFormats, RequestedFormats
from stages.records.formats import Granularity, PerBlock, PerChannel, WeightForm
from stages.records.sites import MatMulSite

_STAYS: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """What formats are chosen from: the target, the request, and the model."""

    target: Target | None
    requested: RequestedFormats
    facts: ModelFacts

    def choose(self) -> FormatChoice:
        return choose_formats(self.target, self.requested, self.facts)

    def open(self) -> OpenFormats:
        return open_formats(self.target, self.requested, self.facts)


def find_target(config: QuantizeConfig, directory: ModelDirectory, facts: ModelFacts) -> BaseTarget:
    """Return the target that was named, or the base's."""
    if config.follows_base:
        return target_of_base(directory, facts)
    return BaseTarget(target=config.parsed_target, why="")


def requested_formats(config: QuantizeConfig, sites: Sequence[MatMulSite]) -> RequestedFormats:
    """Return the options that were given, and not left to the target."""
    decided_elsewhere = config.plan is not None or (
        config.lm_head is None and (config.has_budget or config.checkpoint is not None)
    )
    others = None if config.checkpoint is None else _STAYS
    return RequestedFormats(
        form=_requested_form(config),
        block_size=config.block_size,
        eight_bit=_requested_eight_bit(config),
        mixed=config.enable_mixed_quant and not config.layers_8bit,
        named_eight_bit=bool(config.layers_8bit) or config.lm_head == "8",
        zero_point=config.use_zero_point,
        scale_range=config.scale_range,
        scale_type=config.scale_type,
        rotary=config.rotary_tables,
        lm_head="none" if config.lm_head is None and excludes_lm_head(sites, config) else config.lm_head,
        lm_head_open=decided_elsewhere,
        embedding=config.requested_embedding or others,
        embedding_axis=config.embedding_axis,
        gather_form=config.gather_form,
        gather_block_size=config.gather_block_size,
        accuracy_level=config.accuracy_level,
        experts=config.experts,
    )


def _requested_eight_bit(config: QuantizeConfig) -> Granularity | None:
    match config.int8_block_size:
        case None:
            return None
        case "channel":
            return PerChannel()
        case int(size):
            return PerBlock(block_size=size)


def _requested_form(config: QuantizeConfig) -> WeightForm | None:
    if config.use_column_major:
        return WeightForm.DQ_COLUMN_MAJOR
    if config.algo == "rtn":
        return WeightForm.QDQ
    return None if config.weight_operator is None else WeightForm(config.weight_operator)

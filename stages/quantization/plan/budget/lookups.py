"""Forecast what the lookups of an embedding lose by each format that a budget may give the table.

An error in a token's row goes through every layer, so the model is run: the base reads rows of rounded numbers, and the
Kullback-Leibler divergence of its logits is what the format costs the lookups, in nats a token. Where the other
forecasts are no nats but relative errors, this one is that of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float
from torch import Tensor

from stages.model.directory import ModelDirectory
from stages.model.weights import read_rows
from stages.quantization.plan.budget.sensitivity import divergence
from stages.quantization.search.affine import RangeRule, choose_parameters, join, round_trip, split
from stages.records.formats import EmbeddingTable, QuantSpec
from stages.runtime.providers import choose_providers
from stages.runtime.weight_trials import open_row_trials


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupForecast:
    """A base model, token ids that its table is looked up for, and how ranges become scales."""

    model: ir.Model
    directory: ModelDirectory
    windows: np.ndarray
    """[windows, length] token ids."""
    rule: RangeRule

    def losses(self, table: EmbeddingTable, specs: Mapping[str, QuantSpec], *, in_nats: bool) -> dict[str, float]:
        """Return what each of ``specs`` costs, by its key.

        Args:
            table: the embedding.
            specs: number formats by the keys that the losses get.
            in_nats: whether to run the model; else losses are squared errors relative to the rows.

        Raises:
            GraphError: ONNX Runtime can't run the base model.
        """
        known = _Rows.of(self.model, table, self.windows)
        stored = {key: known.rounded(spec, self.rule) for key, spec in specs.items()}
        if not in_nats:
            return {key: known.relative_error(each) for key, each in stored.items()}
        with open_row_trials(self.model, self.directory, table, choose_providers("cuda,cpu")) as trials:
            base = trials.logits_of_rows(self.windows, dict.fromkeys(table.gathers, known.look_up))
            return {
                key: divergence(base, trials.logits_of_rows(self.windows, dict.fromkeys(table.gathers, each.look_up)))
                for key, each in stored.items()
            }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The rows of the tokens that occur, in float32."""

    tokens: np.ndarray
    """Sorted ids."""
    numbers: Float[Tensor, "tokens D"]

    @classmethod
    def of(cls, model: ir.Model, table: EmbeddingTable, windows: np.ndarray) -> _Rows:
        tokens, cpu = np.unique(windows), torch.device("cpu")
        rows = [read_rows(model, table, slice(int(token), int(token) + 1), cpu) for token in tokens]
        return cls(tokens=tokens, numbers=torch.cat(rows))

    def rounded(self, spec: QuantSpec, rule: RangeRule) -> _Rows:
        blocks = split(self.numbers, spec.block_size(self.numbers.shape[1]))
        stored = round_trip(blocks, choose_parameters(blocks, spec, rule), spec)
        return _Rows(tokens=self.tokens, numbers=join(stored, self.numbers.shape[1]))

    def relative_error(self, other: _Rows) -> float:
        return float((other.numbers - self.numbers).square().sum() / self.numbers.square().sum())

    def look_up(self, windows: np.ndarray) -> Float[Tensor, "batch length D"]:
        return self.numbers[torch.from_numpy(np.searchsorted(self.tokens, windows))]

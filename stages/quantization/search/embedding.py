"""Quantize embedding tables to INT4 or INT8: symmetric, rounded to nearest, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import choose_parameters, join, quantize, split
from stages.quantization.weights.bitpack import pack, slices
from stages.records.formats import EmbeddingPlan, torch_float
from stages.records.results import QuantizedTable
from stages.system.hardware import one_thread_each

_CHUNK = 1 << 20
"""Numbers that a thread rounds at once: about 25 MB of work space, whatever the size of the table."""
_ROWS = 256
"""Chunks hold a multiple of this many rows: whole blocks of tokens, and whole bytes of codes."""


def quantize_table(plan: EmbeddingPlan, read_rows: Callable[[slice], Float[Tensor, "rows D"]]) -> QuantizedTable:
    """Round one table to codes and scales; ``read_rows`` reads rows of it in float32, in several threads.

    Only the packed codes and the scales of the whole table are held in memory.
    """
    vocabulary, hidden = plan.table.shape
    packed = np.empty(plan.packed_bytes, np.uint8)
    scales = torch.empty(plan.scales_shape, dtype=torch_float(plan.spec.scale_dtype))
    per_scale = plan.block_size if plan.axis == 0 else 1

    def round_rows(rows: slice) -> None:
        codes, chosen = _round(read_rows(rows), plan)
        first, last = (-(-row * hidden * plan.bits // 8) for row in (rows.start, rows.stop))
        packed[first:last] = pack(codes.to(torch.int8).cpu(), plan.bits)
        scales[rows.start // per_scale : -(-rows.stop // per_scale)] = chosen.to(scales.dtype).cpu()

    with one_thread_each(torch.get_num_threads()) as pool:
        for _ in pool.map(round_rows, slices(vocabulary, max(_CHUNK // hidden // _ROWS, 1) * _ROWS)):
            pass
    return QuantizedTable(packed=torch.from_numpy(packed), scales=scales)


def _round(
    rows: Float[Tensor, "rows D"], plan: EmbeddingPlan
) -> tuple[Float[Tensor, "rows D"], Float[Tensor, "blocks_0 blocks_1"]]:
    """Round some rows to codes and scales, both in the table's orientation."""
    along = rows if plan.axis == 1 else rows.T
    blocks = split(along, plan.block_size)
    parameters = choose_parameters(blocks, plan.spec, plan.scale_range)
    codes = join(quantize(blocks, parameters, plan.spec), along.shape[1])
    if plan.axis == 1:
        return codes, parameters.scales
    return codes.T, parameters.scales.T

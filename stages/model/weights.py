"""The only reader of weights: any ONNX layout and type becomes a canonical [N, K] tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import GraphError, SolveError
from stages.records.formats import EmbeddingTable
from stages.records.sites import MatMulSite, WeightLayout


def all_finite(numbers: Float[Tensor, "*shape"]) -> bool:
    """True where ``numbers`` hold neither NaN nor an infinity; of no numbers too. Reads them once, without a copy.

    Smallest and largest number tell, since a NaN among the numbers becomes both; ``isfinite(...).all()`` writes four
    temporaries and took 20 times as long.
    """
    if numbers.numel() == 0:
        return True
    low, high = numbers.aminmax()
    return bool(low.isfinite() & high.isfinite())


def read_weight(model: ir.Model, site: MatMulSite, device: torch.device) -> Float[Tensor, "N K"]:
    """One site's weight in float32 on ``device``; nothing of it stays in host memory afterwards.

    Raises:
        GraphError: the initializer is gone.
        SolveError: the weight holds NaN or infinite values.
    """
    value = model.graph.initializers.get(site.weight)
    if value is None or value.const_value is None:
        raise GraphError(f"The weight '{site.weight}' of {site.name} is not in the graph; build the model again.")
    weight = to_torch(value.const_value.numpy()).to(device=device, dtype=torch.float32, copy=True)
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()
    if site.layout is WeightLayout.K_BY_N:
        weight = weight.T.contiguous()
    if not all_finite(weight):
        raise SolveError(f"The weight of {site.name} holds NaN or infinite values; build the base model again.")
    return weight


def read_rows(model: ir.Model, table: EmbeddingTable, rows: slice, device: torch.device) -> Float[Tensor, "rows D"]:
    """Some rows of an embedding in float32 on ``device``; the others are not read.

    Raises:
        GraphError: the initializer is gone.
        SolveError: the rows hold NaN or infinite values.
    """
    value = model.graph.initializers.get(table.weight)
    if value is None or value.const_value is None:
        raise GraphError(f"The embedding '{table.weight}' is not in the graph; build the model again.")
    stored = value.const_value.numpy()
    part = np.array(stored[:, rows].T if table.transposed else stored[rows], order="C")
    del stored
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()
    numbers = to_torch(part).to(device=device, dtype=torch.float32)
    if not all_finite(numbers):
        raise SolveError(f"The embedding '{table.weight}' holds NaN or infinite values; build the base model again.")
    return numbers


def to_torch(array: np.ndarray) -> Tensor:
    """A torch tensor with the array's values and type, bfloat16 included."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)

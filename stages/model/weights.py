"""Read weights and embeddings from a graph, in any ONNX layout and float type, as float32 tensors [N, K]."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import GraphError, SolveError
from stages.records.formats import EmbeddingTable
from stages.records.sites import MatMulSite, WeightLayout

_COMPARED_ROWS = 1024
_READ_AT_ONCE, _LEAST_ROWS = 1 << 22, 64
"""Numbers that are made float32 and turned at once, and rows of them at least."""
_BYTE = 8
_FEWEST_BYTES = 1 << 14
"""Less than this is not worth another reader of a tensor."""
_END = 4096
"""Bytes at either end of a tensor."""


def all_finite(numbers: Float[Tensor, "*shape"]) -> bool:
    """Return whether ``numbers``, if any, hold neither NaN nor an infinity; reads them once, without a copy.

    The smallest and the largest number tell, since a NaN becomes both; ``isfinite(...).all()`` writes four temporaries
    and took 20 times as long.
    """
    if numbers.numel() == 0:
        return True
    low, high = numbers.aminmax()
    return bool(low.isfinite() & high.isfinite())


def require_finite(numbers: Float[Tensor, "rows columns"], description: str) -> Float[Tensor, "rows columns"]:
    """Return ``numbers``; raise SolveError where ``description`` holds NaN or infinite values."""
    if not all_finite(numbers):
        raise SolveError(f"The {description} holds NaN or infinite values; build the base model again.")
    return numbers


def read_weight(model: ir.Model, site: MatMulSite, device: torch.device) -> Float[Tensor, "N K"]:
    """Return one site's weight in float32 on ``device``; nothing of it stays in host memory.

    Args:
        model: the graph that holds it.
        site: where the weight is read.
        device: where the tensor will lie.

    Raises:
        GraphError: the initializer is gone.
        SolveError: the weight holds NaN or infinite values.
    """
    stored = _stored(model, site.weight, f"weight '{site.weight}' of {site.name}")
    numbers = stored.numpy() if site.expert is None else stored.numpy()[site.expert.index]
    weight = torch.empty((site.out_features, site.in_features), device=device)
    turned = site.layout is WeightLayout.K_BY_N
    for part, rows in _in_parts(numbers.reshape(weight.shape[::-1] if turned else weight.shape)):
        (weight.T if turned else weight)[part] = to_torch(rows).to(device=device, dtype=torch.float32)
    del numbers, rows
    _release(stored)
    return require_finite(weight, f"weight of {site.name}")


def _in_parts(numbers: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield some rows after others, so that no second copy of a matrix is ever there."""
    step = max(_READ_AT_ONCE // max(numbers.shape[1], 1), _LEAST_ROWS)
    for start in range(0, len(numbers), step):
        yield slice(start, start + step), numbers[start : start + step]


def stored_weight(model: ir.Model, site: MatMulSite) -> Float[Tensor, "N K"]:
    """Return one site's weight as the graph has it: a view of the file, which is read where it is looked at.

    Args:
        model: the graph that holds it.
        site: where the weight is read.

    Raises:
        GraphError: the initializer is gone.
    """
    stored = _stored(model, site.weight, f"weight '{site.weight}' of {site.name}")
    numbers = _mapped(stored) if isinstance(stored, ir.ExternalTensor) else stored.numpy()
    weight = to_torch(numbers if site.expert is None else numbers[site.expert.index])
    if site.layout is WeightLayout.K_BY_N:
        return weight.reshape(site.in_features, site.out_features).T
    return weight.reshape(site.out_features, site.in_features)


def _mapped(stored: ir.ExternalTensor) -> np.ndarray:
    """Return a tensor's numbers as pages of its file; writing there, which torch wants to be allowed, changes none."""
    shape = tuple(stored.shape.numpy())
    return np.memmap(stored.path, stored.dtype.numpy(), "c", stored.offset or 0, shape).view(np.ndarray)


def read_vector(model: ir.Model, name: str, device: torch.device) -> Float[Tensor, " K"]:
    """Return an initializer [K], such as a norm's gain, in float32 on ``device``.

    Args:
        model: the graph that holds it.
        name: the initializer's.
        device: where the tensor will lie.

    Raises:
        GraphError: the initializer is gone.
        SolveError: it holds NaN or infinite values.
    """
    stored = _stored(model, name, f"vector '{name}'")
    vector = to_torch(stored.numpy()).to(device=device, dtype=torch.float32, copy=True)
    return require_finite(vector.reshape(1, -1), f"vector '{name}'")[0]


def read_rows(model: ir.Model, table: EmbeddingTable, rows: slice, device: torch.device) -> Float[Tensor, "rows D"]:
    """Return some rows of an embedding in float32 on ``device``; the others are not read.

    Args:
        model: the graph that holds it.
        table: the embedding.
        rows: token ids.
        device: where the tensor will lie.

    Raises:
        GraphError: the initializer is gone.
        SolveError: the rows hold NaN or infinite values.
    """
    stored = _stored(model, table.weight, f"embedding '{table.weight}'")
    whole = _mapped(stored) if isinstance(stored, ir.ExternalTensor) else stored.numpy()
    part = np.array(whole[:, rows].T if table.transposed else whole[rows], order="C")
    del whole
    return require_finite(to_torch(part).to(device=device, dtype=torch.float32), f"embedding '{table.weight}'")


def find_tied_site(model: ir.Model, table: EmbeddingTable, sites: Sequence[MatMulSite]) -> MatMulSite | None:
    """Return the first site that multiplies with the very numbers of ``table``; None where there is none.

    Data decides, never a flag: the two are one initializer, directly or through a Transpose, or two with equal bytes.
    Where the files of the weights are missing, two initializers count as different.

    Args:
        model: the graph that holds both.
        table: the embedding.
        sites: of the same graph.
    """
    return next((site for site in sites if _has_shape_of(site, table) and _holds_rows_of(model, site, table)), None)


def find_equal_initializers(model: ir.Model, apart_from: Collection[str] = ()) -> tuple[tuple[ir.Value, ...], ...]:
    """Return the initializers of the main graph that hold the same bytes in the same shape and type, together.

    Small ones, and those that callers replace or read, are left out, and tensors that are yet to be made. There are
    none where the files of the weights are missing.

    Args:
        model: the graph that holds them.
        apart_from: names of those that are not looked at.
    """
    alike: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and value.name not in apart_from and _may_be_merged(value, tensor):
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    try:
        for ends_only in (True, False):  # the ends are soon read, and tell most apart
            parts: dict[tuple[object, ...], list[ir.Value]] = {}
            for key, values in alike.items():
                for value in values if len(values) > 1 else []:
                    parts.setdefault((key, _digest(value, ends_only=ends_only)), []).append(value)
            alike = parts
    except (OSError, ValueError):  # the data file is missing or cut short
        return ()
    return tuple(tuple(values) for values in alike.values() if len(values) > 1)


def _may_be_merged(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, ir.LazyTensor) or value.is_graph_input() or value.is_graph_output():
        return False
    return not tensor.dtype.is_string() and tensor.dtype.bitwidth >= _BYTE and tensor.nbytes >= _FEWEST_BYTES


def _digest(value: ir.Value, *, ends_only: bool) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    numbers = memoryview(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    found = hashlib.sha256(numbers[:_END])
    found.update(numbers[-_END:] if ends_only else numbers)
    del numbers
    _release(tensor)
    return found.digest()


def _has_shape_of(site: MatMulSite, table: EmbeddingTable) -> bool:
    return (site.out_features, site.in_features) == table.shape and site.dtype == table.dtype


def _holds_rows_of(model: ir.Model, site: MatMulSite, table: EmbeddingTable) -> bool:
    turned = site.layout is WeightLayout.K_BY_N
    if site.weight == table.weight:
        return turned == table.transposed
    try:
        stored = [model.graph.initializers[name].const_value for name in (site.weight, table.weight)]
        weight, rows = (None if tensor is None else tensor.numpy() for tensor in stored)
    except (OSError, ValueError):  # the data file is missing or cut short
        return False
    if weight is None or rows is None:
        return False
    weight, rows = weight.T if turned else weight, rows.T if table.transposed else rows
    starts = range(0, len(rows), _COMPARED_ROWS)
    equal = all(np.array_equal(weight[start:][:_COMPARED_ROWS], rows[start:][:_COMPARED_ROWS]) for start in starts)
    del weight, rows
    for tensor in filter(None, stored):
        _release(tensor)
    return equal


def _stored(model: ir.Model, name: str, description: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise GraphError(f"The {description} is not in the graph; build the model again.")
    return value.const_value


def _release(stored: ir.TensorProtocol) -> None:
    if isinstance(stored, ir.ExternalTensor):
        stored.release()


def to_torch(array: np.ndarray) -> Tensor:
    """Return a torch tensor with the array's values and type, bfloat16 included."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)

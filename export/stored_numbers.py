"""Read back what was saved for a site: inputs first, whatever the form that it is stored in."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from export.data_file import read_initializer
from export.nbits import stored_block_size, unpacked_codes, unpacked_zero_points
from export.qdq import RewrittenSite
from stages.records import WeightForm

Matrix = np.ndarray[tuple[int, int], np.dtype[Any]]


def stored_width(site: RewrittenSite) -> int:
    """Inputs that share one of the stored scales."""
    source = site.source
    if site.form is WeightForm.MATMUL_NBITS:
        return stored_block_size(source.site, source.spec)
    return source.spec.block_size(source.site.in_features)


def stored_matrix(node: ir.Node, site: RewrittenSite) -> Matrix:
    """[K, N]: codes as the store has them, or the floating-point weight of the QDQ form."""
    source, found = site.source, read_initializer(node, site.weight)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_codes(found, source.site, source.spec).T
    return _inputs_first(found, site, source.site.in_features)


def stored_scales(node: ir.Node, site: RewrittenSite) -> Matrix:
    """[nB, N], one row for each ``stored_width`` inputs."""
    return _inputs_first(read_initializer(node, site.scales), site, _num_blocks(site))


def stored_zero_points(node: ir.Node, site: RewrittenSite) -> Matrix | None:
    """[nB, N], or None where no zero point is stored."""
    if site.zero_points is None:
        return None
    found = read_initializer(node, site.zero_points)
    if site.form is WeightForm.MATMUL_NBITS:
        return unpacked_zero_points(found, site.source.site, site.source.spec).T
    return _inputs_first(found, site, _num_blocks(site))


def _num_blocks(site: RewrittenSite) -> int:
    return -(-site.source.site.in_features // stored_width(site))


def _inputs_first(stored: np.ndarray, site: RewrittenSite, rows: int) -> Matrix:
    if site.form in (WeightForm.DQ_COLUMN_MAJOR, WeightForm.MATMUL_NBITS):
        return stored.reshape(-1, rows).T
    return stored.reshape(rows, -1)

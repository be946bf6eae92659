"""The numbers of small constants that decide what a graph means: exponents, shapes, axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant_numbers(value: ir.Value) -> np.ndarray | None:
    """The numbers of an initializer or Constant node; None where ``value`` is neither, or its data file is missing.

    A graph can be looked at without its weights, and model builders put small constants into the same file.
    """
    tensor = ir.convenience.get_const_tensor(value)
    try:
        return None if tensor is None else np.asarray(tensor.numpy())
    except FileNotFoundError:
        return None

"""How many bytes of a weight ONNX Runtime holds while it runs a graph."""

from __future__ import annotations

import onnx_ir as ir

from stages.session import CPU_ONLY
from stages.widen import NARROW


def held_bytes(weight: ir.TensorProtocol, providers: tuple[str, ...]) -> int:
    """Bytes of ``weight`` under ``providers``, at most.

    The CPU provider multiplies in float32: it keeps 16-bit weights as float32 copies (measured with ONNX Runtime 1.31:
    5.2 GB for 2.6 GB of float16; an embedding that is only looked up stays as it is). Others lie as they are stored.
    """
    return weight.nbytes * (2 if providers == CPU_ONLY and weight.dtype in NARROW else 1)

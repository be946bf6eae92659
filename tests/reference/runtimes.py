"""Which stored form each runtime is known to run fast: one plain answer a site, from the notes on ONNX Runtime.

The CPU's answers are measured (x86, 1.20.1 to 1.31.1); the others are read in sources and say less than they may.
"""


def weight_is_fast(
    runtime, release, *, form, bits, block, dtype, zero_point=False, gemm=False, in_features=(1024,), level=None
):
    """``form``: dq, qdq, dq_column_major or matmul_nbits; ``block``: None is a scale per channel."""
    if block is not None and block not in (16, 32, 64, 128, 256):
        return False
    if form == "dq_column_major":
        return runtime == "trt-rtx" and not zero_point and trt_takes(bits, block, in_features)
    if runtime == "cpu":
        return cpu_is_fast(release, form, bits, block, dtype, gemm, level)
    if runtime == "cuda":
        return cuda_is_fast(release, form, bits, block, dtype, gemm)
    if runtime == "dml":
        fused = form == "matmul_nbits" or not gemm or release >= (1, 25)
        return bits == 4 and dtype != "bfloat16" and fused
    if runtime == "trt-rtx":
        return form != "matmul_nbits" and not zero_point and trt_takes(bits, block, in_features)
    if runtime == "webgpu":
        return form == "matmul_nbits" and dtype != "bfloat16" and (bits == 4 or release >= (1, 23))
    assert runtime == "qnn"
    known = release >= (1, 24) and form == "matmul_nbits"
    return known and bits == 4 and block == 32 and not zero_point and dtype == "float32"


def cpu_is_fast(release, form, bits, block, dtype, gemm, level):
    if dtype == "bfloat16":
        return False
    if form == "matmul_nbits":
        # Without an attribute it computes at level 0, and 8 bits are slow below level 4.
        return level == 4 if bits == 4 else level == 4 and release >= (1, 23)
    if bits == 8 and level not in (None, 4):
        return False
    if release >= (1, 25):
        return True
    return bits == 4 and block is not None and dtype == "float32" and not gemm


def cuda_is_fast(release, form, bits, block, dtype, gemm):
    if bits == 4 and block == 256:
        return False
    if dtype == "bfloat16":
        return form == "matmul_nbits" and release >= (1, 23)
    if bits == 8:
        return form == "matmul_nbits" and release >= (1, 22)
    return form == "matmul_nbits" or not gemm or release >= (1, 25)


def trt_takes(bits, block, in_features):
    if bits == 8:
        return block is None
    return block in (64, 128) and all(features % block == 0 for features in in_features)


def lookup_is_fast(runtime, release, *, form, axis, block, width):
    """A quantized embedding's lookup in a float32 or float16 model."""
    if form == "dq" or runtime in ("dml", "trt-rtx"):
        return False
    if runtime == "cuda":
        return release >= (1, 23) and axis == 1 and width % block == 0
    return runtime != "webgpu" or release >= (1, 23)

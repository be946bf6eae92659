"""Quantize a GGUF file with llama.cpp, or run one, in an environment of its own: nothing of ours is imported here.

The only argument is JSON: ``source``, ``output`` (.gguf files) and ``type``; or ``model`` (a .gguf file), ``windows``
(a .npy file of token ids), ``logits`` (the .npy file to write, float32) and ``threads``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from typing import Any

import numpy as np


def quantize(source: str, output: str, kind: str) -> None:
    """Write ``output`` with llama.cpp's defaults for the file type ``kind``."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    code = llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(parameters))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def write_logits(model: str, windows: str, logits: str, threads: int) -> None:
    """Write the logits of each window, which begins with an empty cache.

    Args:
        model: the .gguf file.
        windows: the .npy file of token ids.
        logits: the .npy file to write.
        threads: how many to use.
    """
    from llama_cpp import Llama

    tokens = np.load(windows, allow_pickle=False)
    length = tokens.shape[1]
    llama = Llama(
        model, n_ctx=length, n_batch=length, n_ubatch=length, n_threads=threads, logits_all=True, verbose=False
    )
    shape = (*tokens.shape, llama.n_vocab())
    written = np.lib.format.open_memmap(logits, "w+", np.float32, shape)
    for number, window in enumerate(tokens):
        llama.reset()
        llama.eval(window.tolist())
        written[number] = llama.scores[:length]
    written.flush()


def main(request: dict[str, Any]) -> None:
    """Do what ``request`` asks for."""
    if "type" in request:
        quantize(request["source"], request["output"], request["type"])
    else:
        write_logits(request["model"], request["windows"], request["logits"], request["threads"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=json.loads, help="a JSON object")
    main(parser.parse_args().request)

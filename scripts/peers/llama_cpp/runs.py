"""List the runs of llama.cpp: its own quantizer on a float16 GGUF of the base's weights, run by llama.cpp itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from genai_quant.base_models.checkpoints import GgufCheckpoint, PackagedCheckpoint, find_checkpoint
from genai_quant.base_models.packaged_gguf import gguf_file
from scripts.options import LlamaCppType, PeerConfig
from scripts.peers.environment import ensure_environment, pinned_version, python_of
from scripts.peers.llama_cpp.float16_gguf import write_float16_gguf
from scripts.peers.peer import Peer, empty, float_checkpoint, make_float_checkpoint
from stages.errors import UserError
from stages.evaluation.bench.runs import OtherRuntime, Run
from stages.system.measured_process import run_measured
from stages.system.threads import usable_threads

_HERE = Path(__file__).parent
LLAMA_CPP_RUNNER = _HERE / "run_llama_cpp.py"
LLAMA_CPP_REQUIREMENTS = _HERE / "llama_cpp.txt"
_MODEL = "model.gguf"


def llama_cpp_peers(config: PeerConfig) -> Iterator[Peer]:
    """Yield a run for each file type that was asked for."""
    version = pinned_version(LLAMA_CPP_REQUIREMENTS, "llama-cpp-python")
    for kind in config.llama_cpp:
        note = f"llama-cpp-python {version}, its own quantizer and runtime, without calibration"
        yield Peer(run=_run(kind, config), note=note)


def _run(kind: LlamaCppType, config: PeerConfig) -> Run:
    name = f"llama_cpp-{kind}"
    folder = config.output.absolute() / name
    python = str(python_of(config.llama_cpp_environment_path))
    checkpoint = float_checkpoint(config)
    float16 = checkpoint.with_name(f"{checkpoint.name}.f16.gguf")
    request = {"source": str(float16), "output": str(folder / _MODEL), "type": kind}

    def prepare() -> None:
        source = _source(config)
        ensure_environment(config.llama_cpp_environment_path, LLAMA_CPP_REQUIREMENTS)
        make_float_checkpoint(config)
        if not float16.is_file():
            with tempfile.TemporaryDirectory(dir=config.output) as scratch:
                file = source.file if isinstance(source, GgufCheckpoint) else gguf_file(source.source, Path(scratch))
                write_float16_gguf(file, checkpoint, float16)
        empty(folder)

    return Run(
        name=name,
        command=(python, str(LLAMA_CPP_RUNNER), json.dumps(request)),
        model=folder,
        before=prepare,
        runtime=OtherRuntime(files=(_MODEL,), logits=partial(_logits, python, folder / _MODEL)),
    )


def _source(config: PeerConfig) -> GgufCheckpoint | PackagedCheckpoint:
    """Return the GGUF that the base was built from.

    Raises:
        UserError: it was built from something else.
    """
    source = find_checkpoint(str(config.builder_source))
    if not isinstance(source, GgufCheckpoint | PackagedCheckpoint):
        raise UserError(
            f"llama.cpp needs a GGUF file's tokenizer, and --builder_source {config.builder_source} is none; compare "
            "on a base that was built from a .gguf file."
        )
    return source


def _logits(
    python: str, model: Path, windows: Int64[np.ndarray, "W L"], scratch: Path
) -> Iterator[Float32[np.ndarray, "L V"]]:
    """Yield llama.cpp's logits of each window.

    Args:
        python: interpreter of its environment.
        model: the .gguf file.
        windows: token ids.
        scratch: folder for files of this call.

    Raises:
        UserError: llama.cpp can't run the model.
    """
    tokens, logits = scratch / "llama_cpp_windows.npy", scratch / "llama_cpp_logits.npy"
    np.save(tokens, windows)
    threads = usable_threads()
    request = {"model": str(model), "windows": str(tokens), "logits": str(logits), "threads": threads}
    run_measured((python, str(LLAMA_CPP_RUNNER), json.dumps(request)), model.with_suffix(".log"))
    yield from np.load(logits, mmap_mode="r", allow_pickle=False)
    logits.unlink()

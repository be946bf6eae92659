"""Say which build of torch pip will take, and how much that is, before anything is downloaded.

``python scripts/environment/torch_build.py`` prints the index to take torch from, or nothing where pip's own is right;
sentences for people go to standard error. The environment is still empty: nothing but Python and pip is used.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")
_SECONDS = 60.0
_CPU_COST = "about 0.6 GB to download and 2 GB on disk, 3 minutes on a fast line"
_CUDA_COST = "about 3.1 GB to download and 6 GB on disk, 13 minutes on a fast line"


def choose(has_gpu: bool, needs_cuda: Callable[[str | None], bool | None]) -> tuple[str, str]:
    """Return the index to take torch from, empty for pip's own, and a sentence about it.

    Args:
        has_gpu: whether there is an NVIDIA GPU.
        needs_cuda: whether the torch of an index (None: pip's own) brings CUDA's libraries; None: it can't be told.
    """
    if (from_pip := needs_cuda(None)) is False:
        return "", f"the CPU build of torch: {_CPU_COST}"
    if has_gpu:
        return "", f"the CUDA build of torch, for the NVIDIA GPU here: {_CUDA_COST}"
    if needs_cuda(CPU_INDEX) is False:
        return CPU_INDEX, f"no NVIDIA GPU here, so the CPU build of torch, from {CPU_INDEX}: {_CPU_COST}"
    build = "the CUDA build of torch" if from_pip else "whatever build of torch pip finds, perhaps with CUDA"
    return "", f"no NVIDIA GPU here, but {CPU_INDEX} can't be reached, so {build}: {_CUDA_COST}"


def has_nvidia_gpu() -> bool:
    """Return whether the NVIDIA driver is loaded and lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Path("/proc/driver/nvidia/version").exists()
    done = subprocess.run((program, "-L"), capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def needs_cuda(index: str | None) -> bool | None:
    """Ask pip which torch it would take from ``index``: only the packages' metadata is read."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--report", "-", "--constraint", "constraints.txt", "torch"]
    command += [] if index is None else ["--index-url", index, "--timeout", "5", "--retries", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return brings_cuda(done.stdout)


def brings_cuda(report: str) -> bool:
    """Return whether the torch of pip's JSON ``report`` depends on CUDA's libraries on this system."""
    (torch,) = json.loads(report)["install"]
    wanted = [each for each in torch["metadata"].get("requires_dist", ()) if "extra ==" not in each]
    return sys.platform == "linux" and any(each.startswith(_CUDA_PACKAGES) for each in wanted)


if __name__ == "__main__":
    index, sentence = choose(has_nvidia_gpu(), needs_cuda)
    print(f"== {sentence}", file=sys.stderr)
    print(index)

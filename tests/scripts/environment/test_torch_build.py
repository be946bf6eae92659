"""Without an NVIDIA GPU the CPU build of torch is taken wherever there is one, and the cost is said in any case."""

from __future__ import annotations

import json

import pytest

from scripts.environment.torch_build import CPU_INDEX, brings_cuda, choose


@pytest.mark.parametrize(
    ("has_gpu", "from_pip", "from_cpu_index", "index", "words"),
    [
        (False, False, None, "", "the CPU build of torch: about 0.6 GB"),
        (False, True, False, CPU_INDEX, "no NVIDIA GPU here, so the CPU build of torch, from https"),
        (False, None, False, CPU_INDEX, "no NVIDIA GPU here, so the CPU build of torch, from https"),
        (False, True, None, "", "can't be reached, so the CUDA build of torch: about 3.1 GB"),
        (False, None, None, "", "whatever build of torch pip finds, perhaps with CUDA: about 3.1 GB"),
        (True, True, False, "", "the CUDA build of torch, for the NVIDIA GPU here: about 3.1 GB"),
    ],
)
def test_the_build_follows_the_machine(
    has_gpu: bool, from_pip: bool | None, from_cpu_index: bool | None, index: str, words: str
) -> None:
    found = choose(has_gpu, {None: from_pip, CPU_INDEX: from_cpu_index}.get)
    assert found[0] == index
    assert words in found[1]


@pytest.mark.parametrize(
    ("wanted", "cuda"),
    [
        (["filelock", "nvidia-cudnn-cu13==9.20.0.48; platform_system == 'Linux'"], True),
        (["filelock", "cuda-toolkit[cublas]==13.0.3; platform_system == 'Linux'"], True),
        (["filelock", "nvidia-cudnn; extra == 'cuda'"], False),
    ],
)
def test_cudas_libraries_are_seen(wanted: list[str], cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert brings_cuda(json.dumps({"install": [{"metadata": {"requires_dist": wanted}}]})) is cuda

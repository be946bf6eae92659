"""Check which of the requested execution providers are taken, and that others are named."""

from __future__ import annotations

import pytest
import torch

from stages.errors import UserError
from stages.runtime.providers import CPU, choose_providers


def test_the_cpu_is_always_last_and_missing_providers_are_named() -> None:
    choice = choose_providers("[dml, cpu]")
    assert choice.names[-1] == CPU
    if "DmlExecutionProvider" not in choice.names:
        assert choice.missing[0][0] == "dml"
        assert "built without it" in choice.missing[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, so cuda is not missing")
def test_cuda_is_not_asked_for_without_a_device() -> None:
    choice = choose_providers("cuda,cpu")
    assert choice.names == (CPU,)
    assert choice.missing[0][0] == "cuda"


def test_an_unknown_provider_names_its_option() -> None:
    with pytest.raises(UserError, match="--eps: 'gpu' is not one of"):
        choose_providers("gpu", "--eps")

import pytest

from stages.commands.parsing import Release
from stages.commands.quantize_options import LmHead
from stages.quantization.targets.formats import RequestedFormats
from stages.quantization.targets.rules import Request, lookup_since, unfused_in_dq
from stages.records.formats import Granularity, PerChannel
from stages.records.sites import FloatName
from tests.stages.quantization.targets.requests import facts


def _request(release: Release, dtype: FloatName = "float32", *, gemm: bool = False, **requested: bool) -> Request:
    return Request(release=release, requested=RequestedFormats(**requested), facts=facts(dtype, gemm=gemm))


@pytest.mark.parametrize(
    ("requested", "eight_bit", "lm_head", "stores"),
    [
        ({}, PerChannel(), None, False),
        ({}, PerChannel(), "4", False),
        ({}, PerChannel(), "8", True),
        ({"mixed": True}, PerChannel(), None, True),
        ({"mixed": True}, None, "none", False),
        ({"named_eight_bit": True}, None, None, True),
    ],
)
def test_int8_is_stored_where_it_was_named_or_a_rule_finds_it_and_the_runtime_has_it(
    requested: dict[str, bool], eight_bit: Granularity | None, lm_head: LmHead | None, stores: bool
) -> None:
    assert _request((1, 32), **requested).stores_eight_bit(eight_bit, lm_head) is stores


def test_what_stays_unfused_is_named_until_1_25_fuses_all() -> None:
    request = _request((1, 24), "float16", gemm=True)
    assert unfused_in_dq(request, eight_bit=True, float16=True) == "8-bit codes or float16 scales or Gemm"
    assert unfused_in_dq(request, eight_bit=False, float16=False) == "Gemm"
    assert unfused_in_dq(_request((1, 24)), eight_bit=False, float16=True) == ""
    later = _request((1, 25), "float16", gemm=True)
    assert unfused_in_dq(later, eight_bit=True, float16=True) == ""


def test_embeddings_stay_before_the_first_release_with_a_kernel() -> None:
    found = lookup_since(_request((1, 23)), (1, 23), "it has one")
    assert (found.value, found.why) == (8, "it has one, which reads only the rows it needs; not run here")
    before = lookup_since(_request((1, 22)), (1, 23), "it has one")
    assert (before.value, before.why) == (None, "ONNX Runtime 1.22 looks up on the CPU; from 1.23 on it has one")

"""What a site's name tells."""

from __future__ import annotations

import pytest

from stages.site_names import kind_of, layer_of, short_name


@pytest.mark.parametrize(
    ("site", "short", "kind", "layer"),
    [
        ("/model/layers.12/attn/o_proj/MatMul", "layers.12/attn/o_proj", "attn/o_proj", 12),
        ("/model/layers.0/mlp/experts.3/up_proj/Gemm", "layers.0/mlp/experts.3/up_proj", "mlp/experts.3/up_proj", 0),
        ("/lm_head/MatMul", "lm_head", "lm_head", None),
        ("unnamed", "unnamed", "unnamed", None),
    ],
)
def test_names_are_taken_apart(site: str, short: str, kind: str, layer: int | None) -> None:
    assert (short_name(site), kind_of(site), layer_of(site)) == (short, kind, layer)

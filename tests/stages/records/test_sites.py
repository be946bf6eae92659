"""What a site's name tells."""

from __future__ import annotations

import pytest

from stages.records.sites import kind_of, layer_of, short_name, within_layer


@pytest.mark.parametrize(
    ("site", "short", "kind", "layer"),
    [
        ("/model/layers.12/attn/o_proj/MatMul", "layers.12/attn/o_proj", "attn/o_proj", 12),
        ("/model/layers.0/mlp/experts.3/up_proj/Gemm", "layers.0/mlp/experts.3/up_proj", "mlp/experts.*/up_proj", 0),
        ("/lm_head/MatMul", "lm_head", "lm_head", None),
        ("unnamed", "unnamed", "unnamed", None),
        ("/model/layers/12/attn/o_proj/MatMul", "layers/12/attn/o_proj", "attn/o_proj", 12),
        ("layers.12.self_attn.o_proj", "layers.12.self_attn.o_proj", "self_attn.o_proj", 12),
        ("/model/layers.7/MatMul", "layers.7", "layers.7", 7),
    ],
)
def test_names_are_taken_apart(site: str, short: str, kind: str, layer: int | None) -> None:
    assert (short_name(site), kind_of(site), layer_of(site)) == (short, kind, layer)


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("/model/layers.12/attn/o_proj/MatMul", "attn/o_proj/MatMul"),
        ("/model/layers/12/attn/o_proj/MatMul", "attn/o_proj/MatMul"),
        ("model.layers.12.mlp.down_proj.weight", "mlp.down_proj.weight"),
        ("layers.16", ""),
        ("/lm_head/MatMul", ""),
    ],
)
def test_what_follows_the_layer(name: str, rest: str) -> None:
    assert within_layer(name) == rest

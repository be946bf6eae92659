"""What a site's name tells: its layer, and its kind, the same in every layer."""

from __future__ import annotations

import re

_LAYER = re.compile(r"layers\.(\d+)/")


def short_name(site: str) -> str:
    """The builder's /model/layers.0/attn/o_proj/MatMul as layers.0/attn/o_proj."""
    return site.removeprefix("/model").removeprefix("/").removesuffix("/MatMul").removesuffix("/Gemm")


def kind_of(site: str) -> str:
    """The site's short name without its layer: attn/o_proj."""
    return _LAYER.sub("", short_name(site))


def layer_of(site: str) -> int | None:
    """Index of the decoder layer; None for what lies outside, such as lm_head."""
    found = _LAYER.search(site)
    return None if found is None else int(found[1])

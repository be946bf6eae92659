"""What the name of a site or a weight tells: its layer, and its kind, the same in every layer."""

from __future__ import annotations

import re

_LAYER = re.compile(r"layers[./](\d+)[./]?")
"""The builder writes layers.3/, other exporters layers/3/ or layers.3. with dots throughout."""


def short_name(site: str) -> str:
    """Return the builder's /model/layers.0/attn/o_proj/MatMul as layers.0/attn/o_proj."""
    return site.removeprefix("/model").removeprefix("/").removesuffix("/MatMul").removesuffix("/Gemm")


def kind_of(site: str) -> str:
    """Return the site's short name without its layer: attn/o_proj; a name that is all layer stays."""
    short = short_name(site)
    return _LAYER.sub("", short) or short


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer; None for what lies outside, such as lm_head."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def within_layer(name: str) -> str:
    """Return what follows the layer in ``name``, such as attn/o_proj/MatMul; nothing outside the layers."""
    found = _LAYER.search(name)
    return "" if found is None else name[found.end() :]

"""Fixed rules that say by names and places alone which sites become INT8: those of the tools that are out there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from stages.config import MixedRule
from stages.errors import RecipeError
from stages.records import MatMulSite
from stages.site_names import layer_of, within_layer

_SENSITIVE = re.compile(r"(?:(?:self_)?attn[./](qkv_proj|v_proj)|mlp[./](down_proj))(?!\w)")


def modelopt_takes(rank: int, count: int) -> bool:
    """NVIDIA ModelOpt's default strategy (graph_utils.py, 917-929).

    The first and the last ``count`` // 8, and every third of those between, starting with the first of them.
    """
    edge = count // 8
    return rank < edge or rank >= count - edge or (rank - edge) % 3 == 0


def llamacpp_takes(rank: int, count: int) -> bool:
    """llama.cpp's use_more_bits, which makes Q4_K_M, and k_quant_mixed of onnxruntime-genai's builder (base.py, 1229).

    As many as ModelOpt's, but of those between the last of every three.
    """
    edge = count // 8
    return rank < edge or rank >= 7 * count // 8 or (rank - edge) % 3 == 2


_RULES: Mapping[MixedRule, Callable[[int, int], bool]] = MappingProxyType(
    {"modelopt": modelopt_takes, "llamacpp": llamacpp_takes}
)


def sensitive_sites(sites: Sequence[MatMulSite], rule: MixedRule) -> tuple[str, ...]:
    """The qkv (or v) projections and down projections that ``rule`` stores as INT8, counted by kind in layer order.

    Raises:
        RecipeError: no site has a name that the rules know.
    """
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for site in sites:
        layer, match = layer_of(site.name), _SENSITIVE.match(within_layer(site.name))
        if layer is not None and match is not None:
            kinds[match[1] or match[2]].append((layer, site.name))
    if not kinds:
        raise RecipeError(
            "--enable_mixed_quant: no site is called layers.N/attn/qkv_proj, v_proj or layers.N/mlp/down_proj; "
            "name the sensitive sites with --layers_8bit."
        )
    takes = _RULES[rule]
    return tuple(
        name
        for members in kinds.values()
        for rank, (_, name) in enumerate(sorted(members))
        if takes(rank, len(members))
    )

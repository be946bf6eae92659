"""Rows of a graph's weight are found in a checkpoint's layers, packed, taken apart or interleaved."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.quantization.checkpoints.matching import Piece, find_pieces
from tests.stages.quantization.checkpoints.packers import rounded

K = 128


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed))


def stored(weight: Tensor) -> Tensor:
    return rounded(weight, 32).floats


def joined(pieces: tuple[Piece, ...], modules: dict[str, Tensor]) -> Tensor:
    return torch.cat([modules[piece.module][piece.first : piece.last] for piece in pieces])


def test_layers_that_the_graph_packs_are_stacked() -> None:
    q, k, v = rows(64, 0), rows(16, 1), rows(16, 2)
    modules = {"v": stored(v), "q": stored(q), "k": stored(k), "o": stored(rows(96, 3))}
    found = find_pieces(torch.cat([q, k, v]), modules)
    assert [(piece.module, piece.first, piece.last) for piece in found or ()] == [
        ("q", 0, 64),
        ("k", 0, 16),
        ("v", 0, 16),
    ]


def test_a_layer_that_the_graph_takes_apart_is_cut() -> None:
    gate, up = rows(40, 0), rows(40, 1)
    modules = {"gate_up": stored(torch.cat([gate, up]))}
    assert find_pieces(up, modules) == (Piece(module="gate_up", first=40, last=80),)


def test_heads_that_lie_in_turn_are_put_in_order() -> None:
    heads = [rows(16, seed) for seed in range(6)]  # q k v q k v
    modules = {"wqkv": stored(torch.cat(heads))}
    wanted = torch.cat([heads[0], heads[3], heads[1], heads[4], heads[2], heads[5]])
    found = find_pieces(wanted, modules)
    assert found is not None
    assert len(found) == 6
    assert torch.equal(joined(found, modules), stored(wanted))


def test_columns_that_awq_multiplied_and_rows_of_zeros_are_found() -> None:
    weight = rows(48, 0)
    weight[0] = weight[20] = 0
    scales = torch.exp(0.6 * torch.randn(K, generator=torch.Generator().manual_seed(5)))
    modules = {"other": stored(rows(48, 1)), "it": stored(weight * scales)}
    assert find_pieces(weight, modules) == (Piece(module="it", first=0, last=48),)


def test_single_rows_that_a_quantizer_lost_end_no_layer() -> None:
    weight = rows(48, 0)
    lost = weight.clone()
    lost[[0, 20, 21, 47]] = rows(4, 7)
    modules = {"other": stored(rows(48, 1)), "it": stored(lost)}
    assert find_pieces(weight, modules) == (Piece(module="it", first=0, last=48),)


def test_rows_of_another_layer_end_one_however_few_rows_are_left() -> None:
    heads = [rows(8, seed) for seed in range(3)]
    modules = {"fused": stored(torch.cat(heads))}
    found = find_pieces(torch.cat([heads[2], heads[0]]), modules)
    assert found == (Piece(module="fused", first=16, last=24), Piece(module="fused", first=0, last=8))
    assert find_pieces(torch.cat([heads[0], rows(8, 9)]), modules) is None


def test_rows_of_another_model_and_shuffled_ones_are_not_found() -> None:
    weight = rows(48, 0)
    assert find_pieces(weight, {"it": stored(rows(48, 1))}) is None
    assert find_pieces(weight, {"it": stored(weight.flip(0))}) is None
    assert find_pieces(weight, {}) is None

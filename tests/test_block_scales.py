"""``--awq_objective block``: input scales judged by the decoder block's output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.block.cut import cut_block
from stages.block.stream import BlockRunner, read_inputs
from stages.block.torch_module import BlockModule
from stages.graph.sites import find_groups
from stages.records import ActivationGroup, ActivationStats, SolvedGroup
from stages.solve.awq import input_scale_candidates
from stages.solve.evaluate import full_ranges, stored_weight
from stages.solve.problem import IDENTITY, GroupProblem, InputScale
from stages.solve.registry import FINISHES
from stages.solve.signround import StreamPair
from stages.tune.in_hand import BlockInHand
from stages.tune.scaling import BlockScaler
from tests.block.blocks import CPU, OpenModel, open_model
from tests.commands import Commands
from tests.reference.rounding import round_trip
from tests.solve.problems import OPTIONS, gram_stats, spec
from tests.test_block_tuning import _calibrated, _quantize
from tests.test_refine import _reports
from tests.tiny_models import VOCABULARY
from tests.written import fused_sites

_WINDOWS = 12
_HELD_OUT = 2
_TOKENS = np.random.default_rng(3).integers(2, VOCABULARY, (_WINDOWS + _HELD_OUT, 24))


class Posed:
    """The second block of the tiny model, rounded to nearest, behind an exact first block."""

    def __init__(self, opened: OpenModel) -> None:
        block = opened.blocks[1]
        cut = cut_block(opened.model, block)
        inputs = read_inputs(
            opened.model, opened.directory, _TOKENS, block.stream_in, cut.shared, frozenset({4, _HELD_OUT})
        )
        self.run = BlockRunner(module=BlockModule(cut, CPU), shared=inputs.shared, batch_size=4)
        self.weights = opened.weights(block)
        self.stream = inputs.stream
        self.wanted = self.run.over(inputs.stream, self.weights)
        groups = find_groups(opened.model)
        names = {site.name for site in block.sites}
        self.groups = tuple(group for group in groups if group.sites[0].name in names)
        activations = tuple(group.activation for group in self.groups)
        self.activations = opened.tap(activations, _TOKENS)

    def problem(self, group: ActivationGroup) -> GroupProblem:
        rows = self.activations[group.activation]
        calibration, held_out = (
            gram_stats(part.reshape(-1, part.shape[-1])) for part in (rows[:_WINDOWS], rows[_WINDOWS:])
        )
        return GroupProblem(
            group=group,
            weights=tuple(self.weights[site.name] for site in group.sites),
            specs=tuple(spec() for _ in group.sites),
            stats=ActivationStats(calibration=calibration, held_out=held_out),
            head_sharing=None,
        )

    def rounded(self, group: ActivationGroup) -> SolvedGroup:
        problem = self.problem(group)
        posed = zip(group.sites, problem.weights, problem.specs, full_ranges(problem, "full", IDENTITY), strict=True)
        return SolvedGroup(group=group, weights=tuple(stored_weight(*parts) for parts in posed), reports=())

    def scaler(self, groups: tuple[ActivationGroup, ...]) -> BlockScaler:
        parts = (slice(0, _WINDOWS), slice(_WINDOWS, None))
        calibration, held_out = (
            StreamPair(exact=self.stream[part], quantized=self.stream[part], wanted=self.wanted[part]) for part in parts
        )
        hand = BlockInHand(
            run=self.run,
            originals=self.weights,
            starts=tuple(self.rounded(group) for group in groups),
            calibration=calibration,
            held_out=held_out,
        )
        return BlockScaler(hand, OPTIONS, FINISHES["awq_lite"], lambda group: [self.problem(group)])

    def loss(self, scale: InputScale, group: ActivationGroup, windows: range) -> float:
        """The error of the block's output, window by window, with weights rounded in float64."""
        weights = dict(self.weights)
        for site in group.sites:
            factors = np.ones(site.in_features) if scale.scale is None else scale.scale.double().numpy()
            scaled = self.weights[site.name].double().numpy() * factors
            stored = round_trip(scaled, 16, 4, symmetric=True, rule="full") / factors
            weights[site.name] = torch.from_numpy(stored).float()
        return float(np.mean([self._window_loss(weights, window) for window in windows]))

    def _window_loss(self, weights: dict[str, Tensor], window: int) -> float:
        at = self.run.shared[_HELD_OUT]
        pair = [window, window]
        with torch.no_grad():
            found = self.run.module(self.stream[pair], weights, at)[0].double()
        wanted = self.wanted[window].double()
        return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.fixture(scope="module")
def posed(tiny_model: Path) -> Posed:
    return Posed(open_model(tiny_model))


@pytest.mark.parametrize("place", range(4))
def test_the_scale_with_the_best_block_output_is_taken(posed: Posed, place: int) -> None:
    group = posed.groups[place]
    problem = posed.problem(group)
    assert problem.stats is not None
    candidates = [IDENTITY, *input_scale_candidates(problem, problem.stats.calibration, OPTIONS.alpha_step)]
    losses = [posed.loss(scale, group, range(8)) for scale in candidates]
    best = candidates[int(np.argmin(losses))]
    result = posed.scaler((group,)).scale_block(lambda: None)
    plain, better = (posed.loss(scale, group, range(_WINDOWS, _WINDOWS + _HELD_OUT)) for scale in (IDENTITY, best))
    assert result.start_loss == pytest.approx(plain, rel=1e-3)
    if better < plain:
        assert {(scale.family, scale.alpha) for scale in result.chosen.values()} == {(best.family, best.alpha)}
        assert result.loss == pytest.approx(better, rel=1e-3)
    else:
        assert not result.chosen
        assert result.loss == result.start_loss


def test_some_activation_gets_another_scale(posed: Posed) -> None:
    """So that the test above compares something."""
    result = posed.scaler(posed.groups).scale_block(lambda: None)
    assert result.chosen
    assert result.loss < result.start_loss


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _calibrated(tiny_model, tiny_text, tmp_path_factory.mktemp("scaled"))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(FINISHES))
@pytest.mark.parametrize("arguments", [(), ("--awqlite_disable_fuse_nodes", "--use_zero_point")], ids=str)
def test_models_with_scales_by_block_run_fused(
    algorithm: str, arguments: tuple[str, ...], tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    options = ("--algo", algorithm, "--awq_objective", "block", "--block_size", 16, "--accuracy_level", 1, *arguments)
    code, printed = _quantize(commands, tiny_model, cache, tmp_path / "out", *options)
    assert code == 0, printed
    assert f"{algorithm} by block INT4" in printed
    assert fused_sites(tmp_path / "out") == (10, 10)
    inside = [line for line in _reports(tmp_path / "out") if "layers" in line["site"]]
    assert all(line["algorithm"] == "block_scales" for line in inside)
    assert all(line["block_loss"] <= line["block_loss_start"] for line in inside)
    assert any(line["block_loss"] < line["block_loss_start"] for line in inside)
    assert not (tmp_path / "out.weights" / "earlier").exists()


@pytest.mark.slow
def test_refining_and_tuning_go_on_from_the_scales(
    tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    options = ("--algo", "signround", "--signround_start", "awq_lite", "--signround_iters", 10, "--block_size", 16)
    code, printed = _quantize(
        commands, tiny_model, cache, tmp_path / "all", *options, "--awq_objective", "block", "--refine"
    )
    assert code == 0, printed
    assert "signround from awq_lite by block refined" in printed


@pytest.mark.parametrize("algorithm", ["rtn_dq", "mse", "awq_clip", "gptq"])
def test_algorithms_without_input_scales_are_refused(
    algorithm: str, tiny_model: Path, cache: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = _quantize(
        commands, tiny_model, cache, tmp_path / "out", "--algo", algorithm, "--awq_objective", "block"
    )
    assert code == 2
    assert "--awq_objective block" in printed
    assert not (tmp_path / "out").exists()

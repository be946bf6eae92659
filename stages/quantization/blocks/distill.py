"""Train the scales of a finished quantization until the quantized model answers as the float model does: ``--distill``.

With codes and zero points fixed, every scale is s e^u, and the loss is KL(float || quantized) of the next token after
all layers: a search minimizes the error of one layer at a time; here the errors of all learn to cancel. Training the
scales last, on the end loss, is the second phase of Chen et al., "EfficientQAT: Efficient Quantization-Aware Training
for Large Language Models", 2024 (https://arxiv.org/abs/2407.11062), here with the float model's answers for labels.
Since dW/du = W, the gradient by a block's u is the sum of gradient times weight over that block, whatever the format.

Memory holds the codes, one layer's weights, and what enters each layer of one batch: each layer runs once to see what
enters the next, and again on the way back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.calibration.text.windows import TokenWindows
from stages.commands.progress import progress_bar
from stages.errors import UserError, in_one_line
from stages.model.directory import ModelDirectory
from stages.model.weights import read_weight
from stages.quantization.blocks.context import reported
from stages.quantization.blocks.learnable_weight import effective_weight
from stages.quantization.blocks.signround import is_check
from stages.quantization.search.affine import join, round_to_storage, split
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import torch_float
from stages.records.quantities import duration
from stages.records.results import QuantizedWeight, SearchStats
from stages.runtime.blocks.chain import Chain
from stages.runtime.blocks.cut import DecoderBlock
from stages.runtime.blocks.module import BlockModule
from stages.runtime.blocks.stream import BlockRunner, in_batches, read_inputs, sizes_of_batches
from stages.system.atomic import atomic_file

_LOGGER = logging.getLogger(__name__)
_RATE = 1e-3
"""First step of every u; it falls linearly to 0. Of 6e-4, 1e-3 and 3e-3 the one that ends with the least divergence."""
_WARM_UP = 0.05
"""Part of the steps in which the rate rises."""
_BETAS = (0.9, 0.99)
_SMALLEST = 1e-12
"""What Adam adds to its divisor: gradients of single scales are far below its usual 1e-8."""
_LARGEST = 0.25
"""Of |u|."""
_CHECKS = 8
"""How often the held-out divergence is measured, besides the start's."""
_JUDGES = 16
"""Held-out windows that decide what is kept, at most."""
_READ_AT_ONCE = 16
"""Batches whose embeddings are read together."""
_STEP_OVER_JUDGING = 2.5
"""Time of training on a window over that of judging one: every layer of the quantized model runs again, and back."""
_SECONDS = 60.0
"""Between two states that a stopped run can resume at."""
_STATE = "distill.pt"


class TrainedScales:
    """One site's quantized weight whose scales are trained; ``logs`` is u, [N, nB], the leaf to train."""

    def __init__(self, start: QuantizedWeight, device: torch.device) -> None:
        """Begin at ``start``, on ``device``; codes are held as bytes where their distance from the zero point fits."""
        self._start = start
        self._in_features = start.codes.shape[1]
        self._size = start.spec.block_size(self._in_features)
        levels = split(start.codes.to(device).float(), self._size)
        if start.zero_points is not None:
            levels -= start.zero_points.to(device).unsqueeze(-1)
        fits = start.spec.bits == 4 or start.zero_points is None
        self._levels = levels.to(torch.int8 if fits else torch.int16)
        self._scales = start.scales.to(device).float()
        self._input_scale = None if start.input_scale is None else start.input_scale.to(device)
        self.logs = torch.zeros_like(self._scales).requires_grad_()

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "N K"]:
        """Return what the site multiplies its unscaled activation with."""
        joined = join(self._levels * self._stored_scales(self.logs).unsqueeze(-1), self._in_features)
        return joined if self._input_scale is None else joined / self._input_scale

    def take_gradient(self, weight: Float[Tensor, "N K"], by_weight: Float[Tensor, "N K"]) -> None:
        """Set the gradient of ``logs``, given ``weight()`` and the loss's gradient by it."""
        self.logs.grad = split(weight * by_weight, self._size).sum(dim=-1)

    def quantized(self, logs: Float[Tensor, "N nB"]) -> QuantizedWeight:
        """Return the weight as it is stored with ``logs`` as its u, on the CPU."""
        scales = self._stored_scales(logs.to(self._scales.device))
        return replace(self._start, scales=scales.to(torch_float(self._start.spec.scale_dtype)).cpu())

    def _stored_scales(self, logs: Tensor) -> Tensor:
        return round_to_storage(self._scales * logs.exp(), self._start.spec.scale_dtype)


def divergence_and_gradient(
    exact: Float[Tensor, "*tokens V"], found: Float[Tensor, "*tokens V"]
) -> tuple[Float[Tensor, "*tokens"], Float[Tensor, "*tokens V"]]:
    """Return KL(softmax(exact) || softmax(found)) of every token, in nats, and its gradient by ``found``.

    The gradient is the difference of the probabilities; autograd would pass over the vocabulary twice as often.

    Args:
        exact: logits.
        found: logits.
    """
    expected, logs = torch.log_softmax(exact, dim=-1), torch.log_softmax(found, dim=-1)
    probabilities = expected.exp()
    losses = torch.linalg.vecdot(probabilities, expected.sub_(logs))
    return losses, logs.exp_().sub_(probabilities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """Mean divergence from the float model on held-out windows, before and after, in nats a token."""

    start: float
    found: float


@dataclass(slots=True, kw_only=True)
class _Reached:
    """How far training has come; ``best`` is the least divergence so far, with its u by site."""

    step: int
    start: float
    best: float
    best_logs: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedChain:
    """The float model and its quantization as chains of torch modules over the same layers."""

    chain: Chain
    directory: ModelDirectory
    fixed: Mapping[str, QuantizedWeight]
    """Quantized sites whose scales aren't trained, by name."""
    trained: Mapping[str, TrainedScales]
    batch_size: int
    device: torch.device
    _modules: dict[str, BlockModule] = field(default_factory=dict)

    def inputs(self, tokens: Int64[np.ndarray, "windows length"]) -> Iterator[_Batch]:
        """Yield the windows in batches, as they enter the first layer."""
        at_once = _READ_AT_ONCE * self.batch_size
        for part in (tokens[place : place + at_once] for place in range(0, len(tokens), at_once)):
            sizes = sizes_of_batches(len(part), 1, self.batch_size)
            first = self.chain.links[0].stream_in
            read = read_inputs(self.chain.graph, self.directory, part, first, self.chain.shared, sizes)
            for batch in in_batches(len(part), self.batch_size):
                yield _Batch(stream=read.stream[batch].to(self.device), shared=read.shared)

    def divergence(self, tokens: Int64[np.ndarray, "windows length"]) -> float:
        """Return the mean divergence over all tokens."""
        with torch.no_grad():
            losses = [
                divergence_and_gradient(expected, logits)[0]
                for batch in self.inputs(tokens)
                for _, expected, logits in self._answers(batch, *self._towards_head(batch)[1:])
            ]
        return float(torch.cat(losses).mean())

    def take_gradients(self, batch: _Batch) -> None:
        """Set the gradient of every trained site's ``logs``, of the batch's mean divergence."""
        entered, exact, tuned = self._towards_head(batch)
        gradients: list[Tensor] = []
        for entering, expected, logits in self._answers(batch, exact, tuned):
            loss, of_logits = divergence_and_gradient(expected, logits.detach())
            gradients += torch.autograd.grad(logits, entering, of_logits / (loss.numel() * len(exact)))
        gradient = torch.cat(gradients)
        for link, stream in zip(reversed(self._layers), reversed(entered), strict=True):
            gradient = self._back(link, batch, stream, gradient)

    @property
    def _layers(self) -> tuple[DecoderBlock, ...]:
        return self.chain.links[:-1]

    @torch.no_grad()
    def _towards_head(self, batch: _Batch) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return what enters each layer of the quantized model, and what enters the head of the float one and of it."""
        exact = tuned = batch.stream
        entered: list[Tensor] = []
        for link in self._layers:
            run, originals = self._runner(link, batch), self.chain.weights(link, self.device)
            entered.append(tuned)
            exact, tuned = run(exact, originals), run(tuned, self._quantized(originals))
        return entered, exact, tuned

    def _answers(self, batch: _Batch, exact: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what enters the quantized head, and the logits of the float model and of the quantized one.

        Window by window: the logits of a whole batch may take gigabytes.
        """
        head = self.chain.links[-1]
        run, originals = self._runner(head, batch), self.chain.weights(head, self.device)
        quantized = self._quantized(originals)
        for wanted, found in zip(torch.split(exact, 1), torch.split(tuned, 1), strict=True):
            entering = found.detach().requires_grad_()
            with torch.no_grad():
                expected = run(wanted, originals)
            yield entering, expected, run(entering, quantized)

    def _back(self, link: DecoderBlock, batch: _Batch, stream: Tensor, gradient: Tensor) -> Tensor:
        """Set the gradients of one layer's sites; return the gradient by what enters it.

        Args:
            link: the layer.
            batch: what it reads beside the stream.
            stream: what enters it.
            gradient: by what leaves it.
        """
        weights = self._quantized(self.chain.weights(link, self.device))
        names = [name for name in weights if name in self.trained]
        leaves = {name: weights[name].requires_grad_() for name in names}
        entering = stream.detach().requires_grad_()
        leaving = self._runner(link, batch)(entering, weights | leaves)
        of_stream, *of_weights = torch.autograd.grad(
            leaving, [entering, *leaves.values()], gradient, allow_unused=True, materialize_grads=True
        )  # no token may have gone to an expert
        for (name, weight), of_weight in zip(leaves.items(), of_weights, strict=True):
            self.trained[name].take_gradient(weight.detach(), of_weight)
        return of_stream

    def _runner(self, link: DecoderBlock, batch: _Batch) -> BlockRunner:
        if link.title not in self._modules:
            self._modules[link.title] = self.chain.module(link, self.device)
        return BlockRunner(module=self._modules[link.title], shared=batch.shared, batch_size=self.batch_size)

    def _quantized(self, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a layer as the quantized model has them; sites that aren't quantized stay."""
        weights = dict(originals)
        for name in originals:
            if name in self.trained:
                weights[name] = self.trained[name].weight()
            elif name in self.fixed:
                weights[name] = effective_weight(self.fixed[name], self.device)
        return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Windows in front of the first layer, and what layers read beside the stream, by batch size and name."""

    stream: Float[Tensor, "batch length hidden"]
    shared: Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distiller:
    """Trains the scales of ``start`` on the answers of the float model, and saves the result to ``store``.

    The recipes of both stores list the same groups. Sites outside of decoder layers stay as they are.
    """

    chain: Chain
    directory: ModelDirectory
    read_stats: Callable[[str], SearchStats]
    """Gives what the search minimized, by activation."""
    start: QuantizedStore
    store: QuantizedStore
    windows: TokenWindows
    batch_size: int
    seed: int
    """Of the order of windows."""
    device: torch.device

    def distill(self) -> Distilled:
        """Train, and save all groups; what is kept has the least divergence on held-out windows, the start included.

        Raises:
            GraphError: ONNX Runtime can't run the part in front of the first layer.
            UserError: what a stopped run resumes at can't be kept beside the weights.
        """
        model = self._open()
        reached = self._train(model)
        for index in range(len(self.store.recipe.groups)):
            self._save(index, model.trained, reached.best_logs)
        self.store.write_report()
        self._state.unlink(missing_ok=True)
        return Distilled(start=reached.start, found=reached.best)

    def _open(self) -> QuantizedChain:
        inside = {site.name for link in self.chain.links[:-1] for site in link.sites}
        fixed: dict[str, QuantizedWeight] = {}
        trained: dict[str, TrainedScales] = {}
        for index in range(len(self.start.recipe.groups)):
            for weight in self.start.read_group(index).weights:
                if weight.site.name in inside:
                    trained[weight.site.name] = TrainedScales(weight, self.device)
                else:
                    fixed[weight.site.name] = weight
        return QuantizedChain(
            chain=self.chain,
            directory=self.directory,
            fixed=fixed,
            trained=trained,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _train(self, model: QuantizedChain) -> _Reached:
        """Take all steps that are left."""
        leaves = [scales.logs for scales in model.trained.values()]
        adam = torch.optim.Adam(leaves, lr=_RATE, betas=_BETAS, eps=_SMALLEST)
        order = np.random.default_rng(self.seed).permutation(len(self.windows.calibration))
        steps = len(in_batches(len(order), self.batch_size))
        judges = self.windows.held_out[:_JUDGES]
        _LOGGER.info(
            "distillation: %d windows of %d tokens in %d steps; %d held-out windows choose what is kept",
            len(order),
            self.windows.calibration.shape[1],
            steps,
            len(judges),
        )
        with progress_bar() as bar:
            reached = self._resumed(model, adam) or self._begun(model, judges)
            task = bar.add_task("distill", total=steps, unit="steps", done=reached.step, keeps="steps")
            kept = time.monotonic()
            rest = self.windows.calibration[order][reached.step * self.batch_size :]
            for batch in model.inputs(rest):
                self._step(model, adam, batch, reached.step / steps)
                reached.step += 1
                judged = is_check(reached.step, steps, _CHECKS)
                if judged:
                    _judge(model, judges, reached)
                if judged or time.monotonic() - kept > _SECONDS:
                    self._keep(model, adam, reached)
                    kept = time.monotonic()
                bar.advance(task, note=f"held-out KL {reached.start:.4f} -> {reached.best:.4f} nats")
        return reached

    def _begun(self, model: QuantizedChain, judges: Int64[np.ndarray, "windows length"]) -> _Reached:
        """Judge the start, and say from the time that this took how long training will take."""
        started = time.monotonic()
        found = model.divergence(judges)
        window = (time.monotonic() - started) / len(judges)
        seconds = window * (_STEP_OVER_JUDGING * len(self.windows.calibration) + _CHECKS * len(judges))
        _LOGGER.info("held-out KL %.4f nats; training takes about %s", found, duration(seconds))
        return _Reached(step=0, start=found, best=found, best_logs=_logs(model))

    def _step(self, model: QuantizedChain, adam: torch.optim.Adam, batch: _Batch, done: float) -> None:
        """Take one step.

        Args:
            model: what is trained.
            adam: moves every u.
            batch: the windows.
            done: the part of all steps before this one.
        """
        for group in adam.param_groups:
            group["lr"] = _RATE * min(1.0, done / _WARM_UP + _WARM_UP) * (1 - done)
        model.take_gradients(batch)
        adam.step()
        with torch.no_grad():
            for scales in model.trained.values():
                scales.logs.clamp_(-_LARGEST, _LARGEST)

    def _save(self, index: int, trained: Mapping[str, TrainedScales], logs: Mapping[str, Tensor]) -> None:
        """Save one group with ``logs`` as the u of its trained sites."""
        solved = self.start.read_group(index)
        names = [weight.site.name for weight in solved.weights]
        if trained.keys().isdisjoint(names):
            self.store.write(index, solved)
            return
        weights = {name: trained[name].quantized(logs[name]) for name in names}
        originals = {site.name: read_weight(self.chain.graph, site, self.device) for site in solved.group.sites}
        searched = self.read_stats(solved.group.activation)
        self.store.write(index, reported(solved, weights, originals, searched, "distill"))

    @property
    def _state(self) -> Path:
        return self.store.folder / _STATE

    def _keep(self, model: QuantizedChain, adam: torch.optim.Adam, reached: _Reached) -> None:
        """Keep what a stopped run resumes at.

        Raises:
            UserError: the disk is full.
        """
        state = {
            "windows": self.windows.fingerprint,
            "step": reached.step,
            "start": reached.start,
            "best": reached.best,
            "best_logs": reached.best_logs,
            "logs": _logs(model),
            "adam": adam.state_dict(),
        }
        try:
            with atomic_file(self._state) as partial:
                torch.save(state, partial)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"The state of --distill can't be written to {self.store.folder} ({in_one_line(error)}); free space "
                "there, or choose another folder with --weights_path."
            ) from error

    def _resumed(self, model: QuantizedChain, adam: torch.optim.Adam) -> _Reached | None:
        """Return how far a stopped run had come on the same windows, its u and Adam restored; None: begin."""
        if not self._state.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self._state, map_location=self.device, weights_only=True)
        except Exception as error:  # a damaged file raises whatever pickle, zipfile or torch raise
            _LOGGER.warning("%s is damaged (%s); --distill begins anew", self._state, in_one_line(error))
            return None
        if state["windows"] != self.windows.fingerprint:
            _LOGGER.warning("%s is of other text; --distill begins anew", self._state)
            return None
        adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for name, scales in model.trained.items():
                scales.logs.copy_(state["logs"][name])
        return _Reached(step=state["step"], start=state["start"], best=state["best"], best_logs=state["best_logs"])


def _judge(model: QuantizedChain, judges: Int64[np.ndarray, "windows length"], reached: _Reached) -> None:
    """Keep the present u where the held-out divergence is the least so far."""
    found = model.divergence(judges)
    if found < reached.best:
        reached.best, reached.best_logs = found, _logs(model)


def _logs(model: QuantizedChain) -> dict[str, Tensor]:
    return {name: scales.logs.detach().clone() for name, scales in model.trained.items()}

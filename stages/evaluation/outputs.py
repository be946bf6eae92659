"""Compare what encoders, projectors and embedding models give with what their base gives, on the same samples.

Of vectors y of the base and z of the model: cosine similarity y.z / (|y| |z|), along the last axis of an output, and
relative error |z - y| / |y|, over all numbers of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from stages.commands.progress import Progress
from stages.errors import UserError
from stages.evaluation.records import OutputEvaluation, OutputRow, OutputScore
from stages.evaluation.speed import describe_accuracy_level, with_shipped_level
from stages.model.directory import ModelDirectory
from stages.model.sizes import model_bytes
from stages.runtime.cpu.runnable import open_file
from stages.runtime.decoder import PAST
from stages.runtime.feeds import Sample, SampleFeeds, as_values
from stages.runtime.session import SessionSettings, runtime_reason

_SMALLEST = 1e-30
"""Least product of norms that is divided by: vectors of zeros count as alike where both are zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedSamples:
    """Samples that models are compared on."""

    samples: tuple[Sample, ...]
    source: str
    """Their origin in words."""


def compare_outputs(
    base: ModelDirectory,
    models: Sequence[ModelDirectory],
    judged: JudgedSamples,
    settings: SessionSettings,
    progress: Progress,
) -> OutputEvaluation:
    """Run the base and every model over the samples, and compare their floating-point outputs.

    Args:
        base: the base model.
        models: what is compared with it.
        judged: samples that no calibration saw.
        settings: how sessions are opened; without an accuracy level each model runs at the one that its files set.
        progress: shows what runs.

    Raises:
        UserError: a model can't be run, lacks an output of the base, or gives numbers that aren't finite.
    """
    expected = list(_run(base, judged.samples, settings, progress))
    _require_finite(base, expected)
    names = [name for name, array in expected[0].items() if array.size and array.ndim]
    if not names:
        raise UserError(f"{base.onnx_file} gives no numbers that could be compared.")
    rows = [_row(base, settings, ())]
    for model in models:
        sums = {name: _Sums() for name in names}
        for wanted, found in zip(expected, _run(model, judged.samples, settings, progress), strict=True):
            _require_finite(model, [found])
            for name, each in sums.items():
                each.add(wanted[name], _output(model, found, name, wanted[name].shape))
        rows.append(_row(model, settings, tuple(each.score(name) for name, each in sums.items())))
    return OutputEvaluation(
        component=base.component, source=judged.source, samples=len(judged.samples), rows=tuple(rows)
    )


def _run(
    model: ModelDirectory, samples: Sequence[Sample], settings: SessionSettings, progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the model's floating-point outputs for each sample, with a progress bar of its own."""
    task = progress.add_task(model.folder.name, total=len(samples), unit="samples")
    with open_file(model.onnx_file, with_shipped_level(settings, model), None) as session:
        feeds = SampleFeeds.of(session, model, names=frozenset(samples[0]))
        # A decoder's cache holds values whose input scales are folded: only what is computed from it can be compared.
        own_cache = {PAST.sub("present", node.name) for node in session.get_inputs()}
        names = [node.name for node in session.get_outputs() if "float" in node.type and node.name not in own_cache]
        for sample in samples:
            try:
                values = session.run_with_ort_values(names, as_values(feeds(sample)))
            except Exception as error:  # onnxruntime raises classes without a common base
                raise UserError(
                    f"ONNX Runtime can't run {model.onnx_file} ({runtime_reason(error)}); try another of --eps."
                ) from error
            yield {name: np.asarray(value.numpy()) for name, value in zip(names, values, strict=True)}
            progress.advance(task)
    progress.remove_task(task)


def _output(
    model: ModelDirectory, found: dict[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> Float[np.ndarray, ...]:
    if name not in found or found[name].shape != shape:
        what = "has none" if name not in found else f"gives {list(found[name].shape)}"
        raise UserError(
            f"The base gives {list(shape)} as output '{name}', and {model.onnx_file} {what}; pass models made from it."
        )
    return found[name]


def _require_finite(model: ModelDirectory, outputs: Sequence[dict[str, np.ndarray]]) -> None:
    for found in outputs:
        for name, array in found.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"{model.onnx_file} gives NaN or infinite values as output '{name}': its weights overflow, or "
                    "float16 does on this execution provider; build it in fp32, or pass other --eps."
                )


def _row(model: ModelDirectory, settings: SessionSettings, scores: tuple[OutputScore, ...]) -> OutputRow:
    return OutputRow(
        name=model.folder.name,
        bytes=model_bytes(model),
        accuracy_level=describe_accuracy_level(model, settings.accuracy_level),
        scores=scores,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over the samples of one output, in float64."""

    cosines: list[np.ndarray] = field(default_factory=list)
    squares: float = 0.0
    errors: float = 0.0

    def add(self, wanted: Float[np.ndarray, "*rows N"], found: Float[np.ndarray, "*rows N"]) -> None:
        """Add one sample."""
        base, model = (np.atleast_1d(each).astype(np.float64).reshape(-1, each.shape[-1]) for each in (wanted, found))
        self.squares += float(np.square(base).sum())
        self.errors += float(np.square(model - base).sum())
        self.cosines.append(cosine_similarity(base, model))

    def score(self, name: str) -> OutputScore:
        """Return what the sums say of the output ``name``."""
        cosines = np.concatenate(self.cosines)
        return OutputScore(
            output=name,
            vectors=len(cosines),
            cosine=float(cosines.mean()),
            worst_cosine=float(cosines.min()),
            relative_error=float(np.sqrt(self.errors / max(self.squares, _SMALLEST))),
        )


def cosine_similarity(
    first: Float[np.ndarray, "rows N"], second: Float[np.ndarray, "rows N"]
) -> Float[np.ndarray, " rows"]:
    """Return the cosine of the angle between each two rows; 1 where both are zeros, 0 where one is."""
    norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    product = norms[0] * norms[1]
    cosines: Float[np.ndarray, " rows"] = (first * second).sum(axis=1) / np.maximum(product, _SMALLEST)
    return np.where((norms[0] == 0) & (norms[1] == 0), 1.0, cosines)

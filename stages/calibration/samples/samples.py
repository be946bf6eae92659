"""Samples of a graph's inputs: split, fingerprinted, and handed out one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.errors import UserError
from stages.records.quantities import counted
from stages.runtime.feeds import Sample

DEFAULT_SAMPLES = 128
"""With those held out from the search."""
MOST_UNSEEN = 32
"""Samples that are kept for the evaluation where there are plenty."""
_SHARE = 10
"""One sample in so many is held out from the search, and one is kept for the evaluation."""
_LEAST = 3
"""One to calibrate on, one held out, one for the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComputedSample(Mapping[str, np.ndarray]):
    """A sample that is computed whenever it is asked for, from what lies in memory."""

    own: Sample
    """What it is made of."""
    known: Sample
    """A part of it that lies in memory."""
    computed: tuple[str, ...]
    """Names of the other part."""
    compute: Callable[[Sample], Sample]
    """Makes that of ``own``."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.known[name] if name in self.known else self.compute(self.own)[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self.known, *self.computed)

    def __len__(self) -> int:
        return len(self.known) + len(self.computed)


def held_arrays(sample: Sample) -> Sample:
    """Return what of a sample lies in memory and tells it from others: all of it, or what it is made of."""
    return sample.own if isinstance(sample, ComputedSample) else sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples in the order of a seed; those of one part are in no other."""

    calibration: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    unseen: tuple[Sample, ...]
    """For the evaluation: neither statistics nor the search saw them."""
    source: str
    """Their origin in words, for tables."""
    tokenizer: str
    """What made arrays of them, in words: a tokenizer or a processor."""
    encoder: str = ""
    """Digest of the model that computes a part of them; empty where none does."""

    @property
    def names(self) -> frozenset[str]:
        """Return the inputs that every sample holds."""
        return frozenset(self.calibration[0])

    @property
    def seq_len(self) -> None:
        """Return None: samples have sizes of their own."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 hex over the samples of calibration and search, and the split."""
        made_by = (self.encoder,) if self.encoder else ()
        return hashlib.sha256(repr((len(self.held_out), self.digests, *made_by)).encode()).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """Return the sha256 hex of each sample that statistics or the search see."""
        return tuple(sample_digest(sample) for sample in (*self.calibration, *self.held_out))

    def batches(self, part: str, batch_size: int) -> Sequence[Sample]:
        """Return what is run of a part, one after the other: a sample at a time, whatever the batch size."""
        del batch_size
        return self.held_out if part == "held_out" else self.calibration


def sample_digest(sample: Sample) -> str:
    """Return the sha256 hex of the names, types, shapes and numbers of what a sample is made of."""
    digest = hashlib.sha256()
    for name, array in sorted(held_arrays(sample).items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCounts:
    """How many samples each part has."""

    calibration: int
    held_out: int
    unseen: int

    @property
    def total(self) -> int:
        """Return the number of all samples."""
        return self.calibration + self.held_out + self.unseen


def held_out_samples(count: int) -> int:
    """Return how many of ``count`` samples are held out from the search."""
    return max(1, count // _SHARE)


def count_samples(available: int, wanted: int | None, source: str) -> SampleCounts:
    """Return how samples are split: a tenth of ``wanted`` is held out, a tenth of all is kept for the evaluation.

    Args:
        available: how many there are.
        wanted: how many to calibrate on and to hold out at most; None: the default number.
        source: the option that names them, for messages.

    Raises:
        UserError: there are too few.
    """
    if available < _LEAST:
        raise UserError(
            f"{source} gives {counted(available, 'sample')}, and at least {_LEAST} are needed: to calibrate "
            "on, to hold out from the search, and to evaluate on; pass more."
        )
    unseen = max(1, min(MOST_UNSEEN, available // _SHARE))
    used = min(wanted or DEFAULT_SAMPLES, available - unseen)
    held_out = held_out_samples(used)
    return SampleCounts(calibration=used - held_out, held_out=held_out, unseen=unseen)


def split_samples(
    found: Iterable[Sample], counts: SampleCounts, *, source: str, tokenizer: str, encoder: str = ""
) -> Samples:
    """Return ``found`` in parts, those to calibrate on first, those for the evaluation last.

    Args:
        found: as many as ``counts`` says, in random order.
        counts: how many each part has.
        source: their origin in words.
        tokenizer: what made arrays of them.
        encoder: digest of the model that computes a part of them.

    Raises:
        UserError: a sample holds other inputs than the first.
    """
    samples = tuple(found)
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise UserError(
                f"{source} has a sample with {', '.join(sorted(sample))} and one with {', '.join(sorted(samples[0]))}; "
                "give each the same inputs."
            )
    seen = counts.calibration + counts.held_out
    return Samples(
        calibration=samples[: counts.calibration],
        held_out=samples[counts.calibration : seen],
        unseen=samples[seen:],
        source=source,
        tokenizer=tokenizer,
        encoder=encoder,
    )

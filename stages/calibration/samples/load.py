"""Read the samples that calibrate and judge a graph: arrays, images, sounds, or documents of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import psutil

from stages.calibration.samples.arrays import ARRAYS, read_arrays
from stages.calibration.samples.documents import document_samples, reads_documents
from stages.calibration.samples.encoded import encoded_samples, find_encoder
from stages.calibration.samples.processors import Medium, find_processor, medium_of, read_media
from stages.calibration.samples.samples import (
    DEFAULT_SAMPLES,
    MOST_UNSEEN,
    Samples,
    count_samples,
    held_arrays,
    split_samples,
)
from stages.commands.calibrate_options import PART_OF_FREE_MEMORY, TextOptions
from stages.errors import UserError
from stages.model.directory import ModelDirectory
from stages.model.load import fingerprint_model
from stages.runtime.feeds import Sample, require_sample_inputs
from stages.runtime.graph_inputs import fed_values

_ARRAYS = "arrays"


def takes_samples(config: TextOptions, model: ir.Model, directory: ModelDirectory) -> bool:
    """Return whether a graph runs on samples and not on windows of text."""
    if config.samples_of(directory.component) is not None:
        return True
    return not config.use_random_calib and reads_documents(model, directory)


def load_samples(config: TextOptions, model: ir.Model, directory: ModelDirectory, dataset: str) -> Samples:
    """Return the samples of a graph, all of them that are used: to calibrate on, held out, and for the evaluation.

    The same options on the same data give the same samples.

    Args:
        config: names files, or the processor and the number of samples.
        model: the graph.
        directory: where it lies.
        dataset: text for graphs that read documents, where no files are named.

    Raises:
        UserError: files can't be read or don't fit the graph, or there are too few.
    """
    path = config.samples_of(directory.component)
    if path is None:
        return document_samples(config, model, directory, dataset)
    generator = np.random.default_rng(config.seed)
    files = sample_files(path)
    files = [files[place] for place in generator.permutation(len(files))]
    medium = _medium(path, files)
    if medium is None:
        samples = _of_arrays(config, path, files, fed_values(model), generator)
    else:
        samples = _of_media(config, path, files, medium, model, directory)
    require_sample_inputs(model, directory, samples.names)
    return samples


def _of_arrays(
    config: TextOptions,
    path: Path,
    files: Sequence[Path],
    inputs: Mapping[str, ir.Value],
    generator: np.random.Generator,
) -> Samples:
    rows: Iterator[Sample] = chain.from_iterable(read_arrays(file, inputs) for file in files)
    if len(files) > 1:  # of one file all rows are there anyway, and any of them may be taken
        rows = islice(rows, (config.calib_size or DEFAULT_SAMPLES) + MOST_UNSEEN)
    found = list(_within_memory(rows))
    counts = count_samples(len(found), config.calib_size, f"--samples {path}")
    order = generator.permutation(len(found))[: counts.total]
    return split_samples((found[place] for place in order), counts, source=path.name, tokenizer="none")


def _of_media(
    config: TextOptions,
    path: Path,
    files: Sequence[Path],
    medium: Medium,
    model: ir.Model,
    directory: ModelDirectory,
) -> Samples:
    counts = count_samples(len(files), config.calib_size, f"--samples {path}")
    processor = find_processor(directory, medium, config.model_name, trust_remote_code=config.trust_remote_code)
    used, encoder = files[: counts.total], find_encoder(model, directory)
    if encoder is None:
        made = read_media(used, processor, directory, fed_values(model))
    else:
        features = read_media(used, processor, encoder.directory, fed_values(encoder.graph))
        made = encoded_samples(used, features, encoder, config, model, directory)
    return split_samples(
        _within_memory(made),
        counts,
        source=f"{medium} in {path.name}",
        tokenizer=processor.title,
        encoder="" if encoder is None else fingerprint_model(encoder.directory),
    )


def _within_memory(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Yield the samples while they fit the memory, where all of a run lie."""
    room = psutil.virtual_memory().available * PART_OF_FREE_MEMORY
    for number, sample in enumerate(samples, start=1):
        room -= sum(array.nbytes for array in held_arrays(sample).values())
        if room < 0:
            raise UserError(f"--samples: {number} samples don't fit the free memory; lower --calib_size.")
        yield sample


def sample_files(path: Path) -> list[Path]:
    """Return the files of a folder that may hold samples, those of subfolders too, or the one that is named.

    Raises:
        UserError: there is nothing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--samples {path} does not exist; pass .npz or .npy files, images or sounds, or a folder.")
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))


def _medium(path: Path, files: list[Path]) -> Medium | None:
    """Return what the files are, None for arrays; files of other kinds are taken out of the list.

    Raises:
        UserError: they are of no kind that is known, or of several.
    """
    kinds = {file: _ARRAYS if file.suffix in ARRAYS else medium_of(file) for file in files}
    found = sorted({kind for kind in kinds.values() if kind is not None})
    if len(found) != 1:
        what = " and ".join(found) or "neither .npz or .npy files nor images or sounds"
        raise UserError(f"--samples {path} holds {what}; pass files of one of these kinds.")
    files[:] = [file for file in files if kinds[file] is not None]
    return None if found[0] == _ARRAYS else cast(Medium, found[0])

"""Choose the samples on which outputs are compared: those that no calibration saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from stages.calibration.cache import CalibrationCache, find_cache
from stages.calibration.samples.documents import encode_documents, reads_documents
from stages.calibration.samples.load import load_samples, takes_samples
from stages.calibration.samples.samples import sample_digest
from stages.calibration.text.offline import gather, paragraphs
from stages.calibration.text.windows import choose_dataset
from stages.commands.calibrate_options import TextOptions, cache_suffix
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.options import default_folder
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.evaluation.compare import read_evaluation_text
from stages.evaluation.outputs import JudgedSamples
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import read_graph
from stages.runtime.feeds import Sample

_DOCUMENT_CHARACTERS = 800
"""Of each piece of an evaluation text that an encoder reads."""


def samples_of_run(config: QuantizeConfig) -> JudgedSamples | None:
    """Return the samples that a run of ``config`` kept for the evaluation; None where its model isn't run on samples.

    A cache that was there already may come from other options: what it calibrated is left out.

    Raises:
        UserError: they can't be read, or all of them were calibrated on.
    """
    directory = locate_model(config.onnx_path, config.component)
    model = read_graph(directory.onnx_file)
    if not takes_samples(config, model, directory):
        return None
    text = "" if config.samples_of(directory.component) is not None else choose_dataset(config).dataset
    found = load_samples(config, model, directory, text)
    cache = find_cache(config.cache_path) if config.needs_cache else None
    return JudgedSamples(
        samples=_uncalibrated(found.unseen, cache, f"The samples of {found.source}"), source=found.source
    )


def judged_by_outputs(config: EvaluateConfig) -> bool:
    """Return whether the outputs of models are compared, and not what they say of text."""
    base = locate_model(config.base, config.component)
    return config.samples is not None or reads_documents(read_graph(base.onnx_file), base)


def samples_to_judge(config: EvaluateConfig) -> JudgedSamples:
    """Return the samples that ``config`` names, without those that calibrated its base by the cache beside it.

    Raises:
        UserError: they can't be read, or all of them were calibrated on.
    """
    base = locate_model(config.base, config.component)
    model = read_graph(base.onnx_file)
    if config.samples is None:
        return JudgedSamples(samples=_of_text(config, model, base), source=config.text)
    options = TextOptions(samples=str(config.samples), model_name=config.model_name, seq_len=config.seq_len)
    found = load_samples(options, model, base, "")
    cache = find_cache(default_folder(config.base, cache_suffix(config.component)))
    every = (*found.unseen, *found.held_out, *found.calibration)
    unseen = _uncalibrated(every, cache, f"--samples {config.samples}")
    return JudgedSamples(samples=unseen[: config.windows], source=found.source)


def _of_text(config: EvaluateConfig, model: ir.Model, base: ModelDirectory) -> tuple[Sample, ...]:
    texts = list(gather(paragraphs(read_evaluation_text(config.text)), _DOCUMENT_CHARACTERS))[: config.windows]
    tokenizer = config.model_name or str(base.folder)
    samples: Sequence[Sample] = encode_documents(texts, model, base, tokenizer, config.seq_len)
    if not samples:
        raise UserError(f"--text {config.text} holds no text; pass another.")
    return tuple(samples)


def _uncalibrated(samples: Iterable[Sample], cache: CalibrationCache | None, source: str) -> tuple[Sample, ...]:
    """Return the samples that neither statistics nor search saw by ``cache``; ``source`` names them in messages.

    Raises:
        UserError: there are none.
    """
    seen = frozenset(() if cache is None else cache.manifest.samples)
    unseen = tuple(sample for sample in samples if sample_digest(sample) not in seen)
    if not unseen:
        raise UserError(f"{source}: the model was calibrated on all of them; pass others.")
    return unseen

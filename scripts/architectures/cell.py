"""Take one tiny model the whole way: build, calibrate, default search, export, verify, evaluate, generate."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime

from scripts.architectures.builder import build_genai_model
from scripts.architectures.configs import Architecture
from scripts.architectures.matrix import Cell, Step
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.quantize_options import QuantizeConfig
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.records.sites import expert_of
from stages.runtime.providers import CPU_ONLY
from stages.runtime.session import runtime_reason

_PROMPT, _NEW_TOKENS = tuple(range(7, 47, 2)), 8
_EXPERTS = ("MoE", "QMoE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One model to take the whole way."""

    architecture: Architecture
    build: str
    """The builder's execution provider."""
    source: Path
    """Hugging Face folder of the tiny model."""
    text: Path
    """To calibrate on."""
    folder: Path
    """Where everything goes that is made."""


class _Stopped(Exception):
    """A step failed."""

    def __init__(self, step: Step, error: BaseException) -> None:
        named = f"{type(error).__name__}: {runtime_reason(error)}"
        super().__init__(str(error) if isinstance(error, UserError) else named)
        self.step = step


def take_the_whole_way(work: Work) -> Cell:
    """Return what became of the model; a step that fails ends it."""
    cell = Cell(architecture=work.architecture.name, build=work.build)
    try:
        _build(work)
        cell = replace(cell, base_generates=_generates(work.folder / "base") is None)
        cell = replace(cell, unweighted=_calibrate(work))
        cell = replace(_quantize(work, cell), divergence=_divergence(work))
        if (failure := _generates(work.folder / "int4")) is not None:
            raise _Stopped("generate", failure)
    except _Stopped as stop:
        return replace(cell, stopped_at=stop.step, reason=" ".join(str(stop).split()))
    return cell


def _build(work: Work) -> None:
    options = ("hf_remote=true",) if work.architecture.is_stand_in else ()
    precision = "fp32" if work.build == "cpu" else "fp16"
    try:
        build_genai_model(work.source, work.folder / "base", precision, work.build, *options)
    except Exception as error:  # whatever the builder may raise
        raise _Stopped("build", error) from error


def _calibrate(work: Work) -> str:
    """Return why tokens aren't weighted; empty where they are."""
    from stages.calibration.run import calibrate

    config = CalibrateConfig(
        onnx_path=work.folder / "base", dataset=str(work.text), calib_size=12, seq_len=64, batch_size=4
    )
    try:
        with _messages("stages.calibration") as said:
            found = calibrate(config)
    except Exception as error:  # a traceback would be a defect of ours, and a row of the table
        if (refusal := _refusal(work.folder / "base")) is not None:
            raise _Stopped("open", refusal) from error
        raise _Stopped("calibrate", error) from error
    if found.key.token_weights != "none":
        return ""
    return next((each.rpartition("--token_weights none: ")[2] for each in said if "count alike" in each), "unknown")


def _refusal(folder: Path) -> UserError | None:
    """Return why ONNX Runtime doesn't open the model in ``folder`` as it stands, or None."""
    try:
        onnxruntime.InferenceSession(locate_model(folder).onnx_file, providers=CPU_ONLY)
    except Exception as error:  # onnxruntime raises classes without a common base
        return UserError(runtime_reason(error))
    return None


def _quantize(work: Work, cell: Cell) -> Cell:
    from stages.quantize import quantize

    try:
        made = quantize(QuantizeConfig(onnx_path=work.folder / "base", output_path=work.folder / "int4"))
    except Exception as error:  # a traceback would be a defect of ours, and a row of the table
        raise _Stopped("quantize", error) from error
    assert made is not None, "one process returns what it made"
    experts = sum(expert_of(site.site) is not None for site in made.search.sites)
    return replace(
        cell,
        sites=len(made.search.sites) - experts,
        experts=experts,
        fused=None if made.export.report is None else made.export.report.fused,
        kept=tuple(sorted(Counter(why for _, why in made.export.kept).items())),
        elsewhere=sum(part.share for part in made.export.unreached if part.op_type in _EXPERTS),
    )


def _divergence(work: Work) -> float:
    from stages.evaluate import evaluate

    config = EvaluateConfig(base=work.folder / "base", model=(work.folder / "int4",), windows=4, seq_len=128, eps="cpu")
    try:
        _, row = evaluate(config).rows
    except Exception as error:  # a traceback would be a defect of ours, and a row of the table
        raise _Stopped("evaluate", error) from error
    return row.accuracy.mean_divergence


@contextmanager
def _messages(name: str) -> Iterator[list[str]]:
    """Give the block a list that gets what the logger ``name`` says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _generates(folder: Path) -> Exception | None:
    """Return why onnxruntime-genai doesn't generate with the model in ``folder`` on the CPU, or None."""
    import onnxruntime_genai

    from stages.runtime.genai import load_genai

    try:
        model = load_genai(onnxruntime_genai, folder, provider="cpu")
        settings = onnxruntime_genai.GeneratorParams(model)
        length = len(_PROMPT) + _NEW_TOKENS
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(list(_PROMPT))
        while not generator.is_done():
            generator.generate_next_token()
        assert len(generator.get_sequence(0)) == length
    except Exception as error:  # whatever the runtime may raise
        return error
    return None

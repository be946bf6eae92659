"""Records of an evaluation, and the JSON file that keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from stages.evaluation.accuracy import Accuracy, PositionBin, WorstToken
from stages.system.json_file import explained, read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Models, text and settings: equal comparisons give equal numbers."""

    models: tuple[tuple[str, str], ...]
    """(folder name, fingerprint), the base first."""
    text: str
    tokens: str
    """sha256 of the windows."""
    windows: int
    seq_len: int
    accuracy_level: int | None
    """Of all models alike; None: of each model the one that its files set."""
    accuracy_levels: tuple[int | None, ...] = ()
    """With which each model's session is opened; empty in records of earlier versions, whose models are run again."""
    providers: tuple[str, ...]
    worst: int
    """How many of the predictions farthest from the base's are kept for each model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model's scores on a text."""

    name: str
    bytes: int
    """The .onnx file and the external data that it refers to."""
    accuracy: Accuracy
    positions: tuple[PositionBin, ...] = ()
    worst: tuple[WorstToken, ...] = ()
    widened: bool = False
    """Whether it holds bfloat16 and ran as float32."""
    norms_written_out: bool = False
    """Whether the norms inside its attention ran as nodes before it."""
    accuracy_level: str = ""
    """The level at which it ran, and what sets it; empty in records of earlier versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One model's greedy continuation of a prompt."""

    model: str
    text: str
    tokens: int
    same_tokens: int
    """Leading tokens that are the base's too; all of them for the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt and every model's answer, the base's first."""

    prompt: str
    templated: bool
    """Whether the base's chat template was applied to it."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second over several rounds."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """One model's speed and memory in onnxruntime-genai."""

    model: str
    prompt: Rate
    decode: Rate
    load_seconds: float
    """Median."""
    peak_bytes: int | None
    """Largest of all rounds, for the whole process, Python included; None where the operating system doesn't say
    (Windows)."""
    accuracy_level: str
    """The level, and which file sets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """A speed test of several models, which run alternately, each round in a process of its own."""

    machine: str
    runtime: str
    threads: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    models: tuple[ModelSpeed, ...]
    """The base first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of an lm-eval task."""

    model: str
    task: str
    metric: str
    filter: str
    """The filter that lm-eval applied to the answers; empty for its default one."""
    value: float
    stderr: float | None
    """Standard error over the samples; None where lm-eval gives none."""
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything known about some models and their base on one text; the base's row comes first."""

    comparison: Comparison
    rows: tuple[ModelRow, ...]
    generations: tuple[Generation, ...] = ()
    speed: SpeedTest | None = None
    tasks: tuple[TaskScore, ...] = ()

    @property
    def levels(self) -> str:
        """Say at which accuracy level each model ran, models with the same one together."""
        models: dict[str, list[str]] = {}
        for row in self.rows:
            models.setdefault(row.accuracy_level or str(self.comparison.accuracy_level), []).append(row.name)
        if len(models) == 1:
            return f"accuracy level {next(iter(models))}"
        return "accuracy levels: " + "; ".join(f"{' and '.join(names)}: {level}" for level, names in models.items())

    def kept_from(self, earlier: Evaluation | None) -> Evaluation:
        """Return this evaluation with what an ``earlier`` one of the same comparison adds to it.

        That is other prompts, other tasks and tasks of other models, and the speed if it wasn't measured again.
        """
        if earlier is None or earlier.comparison != self.comparison:
            return self
        prompts, tasks = {one.prompt for one in self.generations}, {(one.model, one.task) for one in self.tasks}
        return replace(
            self,
            generations=(*(one for one in earlier.generations if one.prompt not in prompts), *self.generations),
            speed=self.speed or earlier.speed,
            tasks=(*(one for one in earlier.tasks if (one.model, one.task) not in tasks), *self.tasks),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputScore:
    """How one output of a model compares with the base's, over all samples."""

    output: str
    vectors: int
    """Vectors along the output's last axis: tokens, patches, frames, or one for each sample."""
    cosine: float
    """Mean cosine similarity of these."""
    worst_cosine: float
    relative_error: float
    """|z - y| / |y| over all numbers, with y the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRow:
    """One model's scores; the base has none."""

    name: str
    bytes: int
    """The .onnx file and the external data that it refers to."""
    accuracy_level: str
    scores: tuple[OutputScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEvaluation:
    """How models that give no text compare with their base, whose row comes first."""

    component: str
    """The part of a package that they are."""
    source: str
    """The samples' origin in words."""
    samples: int
    rows: tuple[OutputRow, ...]


_EVALUATIONS = TypeAdapter(Evaluation)
_SAVED: TypeAdapter[Evaluation | OutputEvaluation] = TypeAdapter(Evaluation | OutputEvaluation)


def save_evaluation(evaluation: Evaluation | OutputEvaluation, path: Path) -> None:
    """Write ``evaluation`` as JSON, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    with explained(f"--results {path} can't be written", "choose another file"):
        write_json(path, _SAVED, evaluation)


def load_evaluation(path: Path, comparison: Comparison) -> Evaluation | None:
    """Return the evaluation in ``path`` if it is of exactly this comparison; else None."""
    evaluation = read_json(path, _EVALUATIONS)
    return None if evaluation is None or evaluation.comparison != comparison else evaluation

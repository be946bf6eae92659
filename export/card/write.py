"""Write README.md and genai_quant.json into an output folder, and add what was measured afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from export.card.record import (
    MODEL_CARD,
    RECORD,
    BaseModel,
    ModelRecord,
    read_record,
    summarize_evaluations,
    write_record,
)
from stages.evaluation.records import Evaluation, OutputEvaluation
from stages.model.genai_config import GENAI_CONFIG
from stages.records.formats import WeightForm
from stages.runtime.genai import has_chat_template
from stages.system.json_file import explained, write_whole
from stages.system.paths import shell_line

_BASE_CARD = "README.base.md"
_TEMPLATE = "card.md.j2"
_STORED: Mapping[WeightForm, str] = MappingProxyType(
    {
        WeightForm.DQ: "Layers are stored as DequantizeLinear and MatMul, which ONNX Runtime fuses when it loads them.",
        WeightForm.QDQ: "Layers are stored in floating point, with QuantizeLinear and DequantizeLinear behind them: "
        "ONNX Runtime packs them when it loads them.",
        WeightForm.DQ_COLUMN_MAJOR: "Layers are stored as DequantizeLinear, Transpose and MatMul, for execution "
        "providers that ask for rows of output channels.",
        WeightForm.MATMUL_NBITS: "Layers are stored as com.microsoft MatMulNBits.",
    }
)


def write_card(folder: Path, record: ModelRecord) -> None:
    """Write both files; what the base brought under the card's name must have moved before.

    Args:
        folder: holds the model; the card says what lies in it.
        record: what is known of the model.
    """
    write_record(folder, record)
    write_whole(folder / MODEL_CARD, render_card(folder, record).encode())


def update_card(folder: Path, evaluations: Sequence[Evaluation], outputs: Sequence[OutputEvaluation] = ()) -> None:
    """Add comparisons of the model in ``folder`` with its base, one for each text or component, to both files.

    Nothing is written where there is no comparison, or no genai_quant.json that this version can read.

    Raises:
        UserError: a file can't be written.
    """
    record = read_record(folder)
    if record is None or not (evaluations or outputs):
        return
    if evaluations:
        record = replace(record, evaluation=summarize_evaluations(tuple(evaluations)))
    if outputs:
        record = replace(record, outputs=tuple(outputs))
    with explained(
        f"{folder / MODEL_CARD} and {RECORD} can't be written", "free space there, or get the right to write"
    ):
        write_card(folder, record)


def move_base_card(folder: Path, *, ours: bool = False) -> None:
    """Rename the README.md that was copied from the base, which describes another model than the one in ``folder``.

    Args:
        folder: the unfinished output.
        ours: whether the base was an output itself, another component of the same package: its card is written anew.
    """
    if ours:
        (folder / MODEL_CARD).unlink(missing_ok=True)
    for card in [file for file in folder.iterdir() if file.name.lower() == MODEL_CARD.lower()]:
        target = folder / _BASE_CARD
        while target.exists():
            target = target.with_suffix(f".base{target.suffix}")
        card.rename(target)


def render_card(folder: Path, record: ModelRecord) -> str:
    """Return the model card; equal records and folders give equal cards."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"cell": _cell, "megabytes": _megabytes, "shell": _word}
    return templates.get_template(_TEMPLATE).render(
        head=yaml.safe_dump(_head(record), sort_keys=False, allow_unicode=True),
        record=record,
        stored=_STORED[record.weight_form],
        has_base_card=(folder / _BASE_CARD).is_file(),
        has_genai_config=(folder / GENAI_CONFIG).is_file(),
        has_template=has_chat_template(folder),
    )


def _head(record: ModelRecord) -> dict[str, object]:
    """Return what the Hugging Face hub reads."""
    bits = sorted(
        {word.lower() for kind in record.formats for word in ("INT4", "INT8") if kind.format.startswith(word)}
    )
    return {
        **_base_entries(record.base),
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "onnxruntime-genai", *bits, "genai-quant"],
    }


def _base_entries(base: BaseModel) -> dict[str, object]:
    named = {} if base.hub_name is None else {"base_model": base.hub_name, "base_model_relation": "quantized"}
    return {**named, **base.license}


def _cell(text: str) -> str:
    """Return ``text`` as it can stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _word(text: str) -> str:
    return shell_line((text,))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

"""Answer the options of ModelOpt-Windows that describe the graph's inputs: here the graph itself tells."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from scripts.options import DropInConfig

_POSITIONS = "position_ids"
_NO_PAST = "the graph has no past key/value inputs"


def answers(config: DropInConfig, model: ir.Model) -> Iterator[str]:
    """Yield a line for each such option that was given: what the graph has, and that the option changes nothing."""
    given = {
        "--add_position_ids": (config.add_position_ids, _positions(model)),
        "--no_position_ids": (config.no_position_ids, _positions(model)),
        "--use_fp32": (config.use_fp32, _past_type(model)),
        "--no_past_kv_inputs": (config.no_past_kv_inputs, _past(model)),
        "--use_buffer_share": (config.use_buffer_share, f"{_past(model)}, with or without a shared buffer"),
    }
    for option, (is_given, answer) in given.items():
        if is_given:
            yield f"{option} changes nothing: {answer}."


def _positions(model: ir.Model) -> str:
    if any(value.name == _POSITIONS for value in model.graph.inputs):
        return f"the graph has the input {_POSITIONS}, which gets 0, 1, 2, ..."
    return f"the graph has no input {_POSITIONS}"


def _past_inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if "past" in (value.name or "")]


def _past(model: ir.Model) -> str:
    count = len(_past_inputs(model))
    return f"the graph has {count} past key/value inputs, which start empty" if count else _NO_PAST


def _past_type(model: ir.Model) -> str:
    types = sorted({str(value.dtype) for value in _past_inputs(model)})
    return f"the graph's past key/values are {' and '.join(types)}, and so is what they get" if types else _NO_PAST

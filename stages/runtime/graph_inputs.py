"""Tell what the inputs of a decoder graph hold, and their shapes for some tokens.

What an input holds is told by its name: the one that genai_config.json gives it, else those that exporters use. The
graph's own fixed dimensions win; the others follow from the tokens, or from genai_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.model.genai_config import EMBEDDED, TOKEN_INPUTS
from stages.model.load import ADAPTER_NAME

TOKENS, MASK, POSITIONS, STATE, _ENCODED = "input_ids", "attention_mask", "position_ids", "past", "encoder"
CACHE_POSITIONS, BEAMS, _PAST_LENGTH = "cache_position", "beam_idx", "past_sequence_length"
_ADAPTER = "adapter"
CARRY_TOKENS = frozenset({TOKENS, *EMBEDDED})
"""Names of the inputs that depend on the tokens themselves; others only on their number."""
ROUND = "pass --samples with files that hold it, or quantize with --algo rtn_dq, which runs no model"
"""The fix in messages about graphs that can't be calibrated."""


@dataclass(frozen=True, slots=True)
class TokenShape:
    """Some tokens [batch, length] behind ``past`` earlier ones, whose keys and values are known."""

    batch: int
    length: int
    past: int = 0

    @property
    def total(self) -> int:
        """Return the number of tokens, the earlier ones included."""
        return self.past + self.length


NUMBERS: Mapping[str, Callable[[TokenShape], int]] = MappingProxyType(
    {
        "num_logits_to_keep": lambda tokens: tokens.length,
        "logits_to_keep": lambda tokens: tokens.length,
        "use_cache_branch": lambda tokens: int(tokens.past > 0),
        "past_key_values_length": lambda tokens: tokens.past,
        _PAST_LENGTH: lambda tokens: tokens.past,
        "past_sequence_lengths": lambda tokens: tokens.past,
        "seqlens_k": lambda tokens: tokens.total - 1,
        "total_sequence_length": lambda tokens: tokens.total,
        "current_sequence_length": lambda tokens: tokens.total,
        "token_type_ids": lambda _: 0,
        "state_update_capture_count": lambda _: 0,
        "state_update_active": lambda _: 0,
    }
)
"""What an input of this name holds in every place."""
_TOTAL_LENGTHS = frozenset({"total_sequence_length", "current_sequence_length"})
_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(TOKEN_INPUTS, TOKENS),
        "past_seq_len": _PAST_LENGTH,
        "total_seq_len": "total_sequence_length",
        **dict.fromkeys(("past_key_names", "past_value_names", "past_names", "past_conv_names"), STATE),
        **dict.fromkeys(("past_recurrent_names", "rnn_prev_states"), STATE),
        **dict.fromkeys(("cross_past_key_names", "cross_past_value_names"), _ENCODED),
        **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), _ENCODED),
    }
)
TELL_LENGTH = frozenset({POSITIONS, CACHE_POSITIONS, "seqlens_k", *_TOTAL_LENGTHS})
"""Inputs from which attention learns how much of a cache is valid, without a mask."""
_KNOWN = frozenset({*CARRY_TOKENS, *NUMBERS, MASK, POSITIONS, CACHE_POSITIONS, BEAMS, STATE, _ENCODED})
_ENCODED_WORDS = re.compile(r"cross|encoder|pixel|image|vision|audio|speech")
_STATE_WORDS = re.compile(r"past|(?<!cos_)(?<!sin_)cache|conv|recurrent|ssm|rnn|lstm|(?<!hidden_)state")
_FIXED_STATE_WORDS = re.compile(r"conv|recurrent|ssm|rnn|lstm|state")
_LENGTH_WORDS = re.compile(r"past|seq|len")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """An input as its graph declares it."""

    name: str
    type: str
    """ONNX Runtime's name of it; empty where it isn't known yet."""
    shape: tuple[int | str | None, ...]
    role: str
    """What it holds, by its usual name; empty where that isn't known."""

    @property
    def comes_from_text(self) -> bool:
        """Return whether tokens, their number and an empty past give all that it holds."""
        return self.role not in ("", _ENCODED, *EMBEDDED)

    @property
    def holds_keys_or_values(self) -> bool:
        """Return whether it is a cache of attention, [batch, heads, length, size]."""
        return self.role == STATE and len(self.shape) == 4 and not _FIXED_STATE_WORDS.search(self.name)


def _roles(names: Iterable[str], configured: Mapping[str, str]) -> dict[str, str]:
    """Return each input's role; ``configured`` holds names by genai_config.json's keys, %d for a layer's number."""
    roles = {name: _role(name, configured) for name in names}
    if not _TOTAL_LENGTHS.isdisjoint(roles.values()):
        # Beside the length of all tokens, onnxruntime-genai feeds GroupQueryAttention's seqlens_k under this name.
        roles = {name: "seqlens_k" if role == _PAST_LENGTH else role for name, role in roles.items()}
    return roles


def _role(name: str, configured: Mapping[str, str]) -> str:
    keys = (key for key, pattern in configured.items() if re.fullmatch(_as_expression(pattern), name))
    for known in (*keys, name):
        usual = _OTHER_NAMES.get(known, known)
        if usual in _KNOWN:
            return usual
    if ADAPTER_NAME.search(name):
        return _ADAPTER
    if _ENCODED_WORDS.search(name):
        return _ENCODED
    return STATE if _STATE_WORDS.search(name) else ""


def _as_expression(pattern: str) -> str:
    return re.escape(pattern).replace("%d", r"\d+")


def token_input(names: Iterable[str], directory: ModelDirectory) -> str | None:
    """Return which of the inputs ``names`` of the graph in ``directory`` holds token ids; None where none does."""
    roles = _roles(sorted(names), directory.input_names)
    return next((name for name, role in roles.items() if role == TOKENS), None)


def inputs_of_session(session: ort.InferenceSession, directory: ModelDirectory) -> tuple[GraphInput, ...]:
    """Return the inputs that a session must be given."""
    nodes = session.get_inputs()
    roles = _roles([node.name for node in nodes], directory.input_names)
    return tuple(
        GraphInput(name=node.name, type=node.type, shape=tuple(node.shape), role=roles[node.name]) for node in nodes
    )


def fed_values(model: ir.Model) -> dict[str, ir.Value]:
    """Return the inputs of the graph that hold no weights, by name."""
    return {str(value.name): value for value in model.graph.inputs if value.name not in model.graph.initializers}


def inputs_of_graph(model: ir.Model, directory: ModelDirectory) -> tuple[GraphInput, ...]:
    """Return the inputs that a session of ``model`` must be given: those without a default."""
    values = fed_values(model)
    roles = _roles(values, directory.input_names)
    return tuple(
        GraphInput(
            name=name,
            type="",
            shape=tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ()),
            role=roles[name],
        )
        for name, value in values.items()
    )


@dataclass(frozen=True, slots=True)
class WindowShape:
    """The number of windows and of their tokens that a graph takes at a time; None where any will do."""

    batch: int | None
    length: int | None

    @classmethod
    def of(cls, inputs: Iterable[GraphInput]) -> WindowShape:
        """Return what the input that carries the tokens declares."""
        shape = next((given.shape[:2] for given in inputs if given.role in CARRY_TOKENS), ())
        batch, length = (dim if isinstance(dim, int) else None for dim in (*shape, None, None)[:2])
        return cls(batch, length)

    def filled(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Yield ``tokens`` [batch, length], padded behind to this shape, as many windows at a time as it has.

        Attention looks back only, so that a causal decoder's results for the tokens themselves stay the same.

        Raises:
            GraphError: they are more than the graph's windows hold.
        """
        batch, length = tokens.shape
        size = self.batch or batch
        if length > (self.length or length):
            self.require(size, length)
        padded = np.pad(tokens, ((0, -batch % size), (0, (self.length or length) - length)), mode="edge")
        yield from (padded[start : start + size] for start in range(0, len(padded), size))

    def require(self, batch: int, length: int) -> None:
        """Raise GraphError unless the graph takes ``batch`` windows of ``length`` tokens."""
        if length != (self.length or length):
            raise GraphError(
                f"The graph takes windows of {self.length} tokens, not {length}; pass --seq_len {self.length}."
            )
        if batch != (self.batch or batch):
            raise GraphError(
                f"The graph takes {self.batch} windows at a time, not {batch}; build it with a batch of any size."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputShapes:
    """Works out the shape of each input for some tokens."""

    kv_heads: int | None = None
    head_size: int | None = None
    windowed_caches: Mapping[str, int] = field(default_factory=dict)
    open_size: int | None = None
    """Size of what text doesn't give, where the graph leaves it open; None: such inputs are refused."""
    advice: str = ROUND
    """The fix in messages about what can't be fed."""

    @classmethod
    def of(cls, directory: ModelDirectory, *, open_size: int | None = None, advice: str = ROUND) -> InputShapes:
        """Return the shapes of the model in ``directory``.

        Args:
            directory: gives head counts and sliding caches.
            open_size: see the field.
            advice: see the field.
        """
        return cls(
            kv_heads=directory.kv_heads,
            head_size=directory.head_size,
            windowed_caches=directory.windowed_caches,
            open_size=open_size,
            advice=advice,
        )

    def refuse(self, given: GraphInput, reason: str) -> GraphError:
        """Return the error about an input that can't be fed for ``reason``."""
        return GraphError(f"Graph input '{given.name}' {reason}; {self.advice}.")

    def require_from_text(self, given: GraphInput) -> None:
        """Raise GraphError where text doesn't give what ``given`` holds."""
        if self.open_size is not None:
            return
        if given.role == _ENCODED:
            raise self.refuse(given, "holds sound or images, or what an encoder makes of them, which text doesn't give")
        if not given.role:
            raise self.refuse(given, "is none that a text decoder has, and has no default")
        if given.role in CARRY_TOKENS and len(given.shape) < 2:
            raise self.refuse(given, f"has shape {list(given.shape)}, not [batch, length] (paged attention?)")
        if given.role in CARRY_TOKENS and given.shape[1] == 1:
            raise self.refuse(given, "holds one token, which nothing comes before")

    def shape(self, given: GraphInput, tokens: TokenShape, mask_length: int | None = None) -> tuple[int, ...]:
        """Return the shape of an input for ``tokens``; the graph's fixed dimensions win.

        Args:
            given: the input.
            tokens: what is run.
            mask_length: keys that an attention mask covers; by default all tokens.

        Raises:
            GraphError: nothing says how large the input is.
        """
        self.require_from_text(given)
        rank = len(given.shape)
        sizes = self._open_sizes(given, tokens, tokens.total if mask_length is None else mask_length)
        if len(sizes) != rank:
            raise self.refuse(given, f"has {rank} dimensions, in place of {len(sizes)}")
        found = [dim if isinstance(dim, int) else size for dim, size in zip(given.shape, sizes, strict=True)]
        if None in found:
            raise self._left_open(given, found.index(None))
        return tuple(int(size) for size in found if size is not None)

    def _open_sizes(self, given: GraphInput, tokens: TokenShape, mask_length: int) -> tuple[int | None, ...]:
        """Return the sizes of the dimensions that the graph may leave open."""
        batch, length, rank = tokens.batch, tokens.length, len(given.shape)
        if given.role == TOKENS or given.role in NUMBERS:
            return (batch, length) if given.role == TOKENS else (batch, length)[:rank]
        if given.role in EMBEDDED:
            return batch, length, *(self.open_size,) * (rank - 2)
        if given.role == POSITIONS:
            return (3, batch, length)[-min(rank, 3) :]  # time, height and width, the same for text
        if given.role == MASK:
            return {2: (batch, mask_length), 3: (batch, length, mask_length)}.get(rank, (batch, 1, length, mask_length))
        if given.role in (CACHE_POSITIONS, BEAMS):
            return (length if given.role == CACHE_POSITIONS else batch,)
        if given.role == STATE:
            return self._state_sizes(given, tokens)
        if given.role == _ADAPTER:
            return (0,) * rank  # of rank 0: the model without an adapter
        return tuple(batch if "batch" in str(dim) else self.open_size for dim in given.shape)

    def _state_sizes(self, given: GraphInput, tokens: TokenShape) -> tuple[int | None, ...]:
        """Return the sizes of a cache [batch, heads, length, size], or of another state with the batch in front."""
        past = self.windowed_caches.get(given.name, tokens.past)
        if given.holds_keys_or_values:
            return tokens.batch, self.kv_heads, past, self.head_size
        return tuple(
            tokens.batch if index == 0 or "batch" in str(dim) else past if _LENGTH_WORDS.search(str(dim)) else None
            for index, dim in enumerate(given.shape)
        )

    def _left_open(self, given: GraphInput, axis: int) -> GraphError:
        if given.holds_keys_or_values:
            what, key = ("number of heads", "num_key_value_heads") if axis == 1 else ("head size", "head_size")
            return GraphError(
                f"Graph input '{given.name}' leaves its {what} open, and genai_config.json doesn't give {key}; put "
                "that file beside the model."
            )
        return self.refuse(given, f"has shape {list(given.shape)}, and nothing gives the size of its axis {axis}")

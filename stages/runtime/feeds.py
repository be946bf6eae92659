"""Make the inputs of a graph from windows of tokens, or from samples: for calibration, evaluation and verification.

Of a decoder, caches and states are zeros, as before the first token. Where the graph takes embedded tokens, the
embedding model makes them. Samples give the inputs of any graph by name: of encoders, projectors, embedding models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from stages.errors import GraphError, in_one_line
from stages.model.directory import ModelDirectory, shared_caches
from stages.model.genai_config import EMBEDDED
from stages.records.formats import FLOAT_TYPES
from stages.runtime.cpu.runnable import open_file
from stages.runtime.graph_inputs import (
    BEAMS,
    CACHE_POSITIONS,
    MASK,
    NUMBERS,
    POSITIONS,
    ROUND,
    STATE,
    TELL_LENGTH,
    TOKENS,
    GraphInput,
    InputShapes,
    TokenShape,
    WindowShape,
    inputs_of_graph,
    inputs_of_session,
    token_input,
)
from stages.runtime.session import SessionSettings

Feed: TypeAlias = np.ndarray | ort.OrtValue
Sample: TypeAlias = Mapping[str, np.ndarray]
"""What a graph's inputs hold in one run, by their names, in any numeric type."""
Batch: TypeAlias = "np.ndarray | Sample"
"""What a graph is run on at a time: token ids [batch, length], or a sample."""
_BFLOAT16 = FLOAT_TYPES["bfloat16"].onnxruntime
_NUMPY_TYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "tensor(bool)": np.dtype(np.bool_),
        "tensor(int8)": np.dtype(np.int8),
        "tensor(uint8)": np.dtype(np.uint8),
        "tensor(int32)": np.dtype(np.int32),
        "tensor(int64)": np.dtype(np.int64),
        "tensor(double)": np.dtype(np.float64),
        **{kind.onnxruntime: kind.numpy for kind in FLOAT_TYPES.values()},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalFeeds:
    """The inputs of an open session for windows of tokens, which hold no padding: attention sees all that came before.

    A cache holds nothing before the first token. One of fixed length is a buffer of zeros: attention knows how much of
    it is valid, or masks hide its first ``hidden_past`` places.
    """

    session: ort.InferenceSession
    inputs: tuple[GraphInput, ...]
    """Those that are fed here."""
    shapes: InputShapes
    embedding: Embedding | None = None
    hidden_past: int = 0

    @classmethod
    def of(
        cls,
        session: ort.InferenceSession,
        directory: ModelDirectory,
        fed_otherwise: frozenset[str] = frozenset(),
        *,
        open_size: int | None = None,
        advice: str = ROUND,
    ) -> CausalFeeds:
        """Return the feeds of a session whose model, or a part of it, lies in ``directory``.

        Args:
            session: the open session.
            directory: gives head counts, sliding caches and the embedding model.
            fed_otherwise: inputs that the caller feeds.
            open_size: see ``InputShapes``.
            advice: see ``InputShapes``.

        Raises:
            GraphError: text doesn't give an input, or the embedding model can't be opened.
        """
        shapes = InputShapes.of(directory, open_size=open_size, advice=advice)
        inputs = tuple(given for given in inputs_of_session(session, directory) if given.name not in fed_otherwise)
        embedded = _require_from_text(inputs, directory, shapes)
        return cls(
            session=session,
            inputs=inputs,
            shapes=shapes,
            embedding=_open_embedding(directory, embedded, advice) if embedded else None,
            hidden_past=_hidden_past(inputs, directory, shapes),
        )

    @property
    def window(self) -> WindowShape:
        """Return the shape of the windows that the graph takes."""
        return WindowShape.of(self.inputs)

    @property
    def guessed(self) -> tuple[str, ...]:
        """Return the names of inputs that are fed zeros of some size, because text doesn't give them."""
        known = () if self.embedding is None else self.embedding.outputs
        return tuple(given.name for given in self.inputs if not given.comes_from_text and given.name not in known)

    @property
    def states(self) -> tuple[str, ...]:
        """Return the names of the caches and of other states."""
        return tuple(given.name for given in self.inputs if given.role == STATE)

    def __call__(self, tokens: np.ndarray, past: int = 0) -> dict[str, Feed]:
        """Return the feeds for ``tokens`` [batch, length] (any integer type).

        Args:
            tokens: token ids.
            past: the number of tokens before them, whose caches and states the caller feeds; 0: they are empty.

        Raises:
            GraphError: the graph takes windows of another shape, or has an input that can't be fed.
        """
        batch, length = tokens.shape
        size = TokenShape(batch, length, past)
        self.window.require(size.batch, size.length)
        made = {} if self.embedding is None else self.embedding(tokens)
        fed = [given for given in self.inputs if not (past and given.role == STATE)]
        values = {given: made[given.name] if given.name in made else self._value(given, tokens, size) for given in fed}
        return {given.name: as_declared(given, value, self.shapes) for given, value in values.items()}

    def _value(self, given: GraphInput, tokens: np.ndarray, size: TokenShape) -> np.ndarray:
        shape = self.shapes.shape(given, size, mask_length=self.hidden_past + size.total)
        if given.role == TOKENS:
            return tokens
        if given.role == MASK:
            return self._mask(given, shape, size)
        if given.role in (POSITIONS, CACHE_POSITIONS):
            self._require_room(given, shape[-1] == size.length, size)
            return np.broadcast_to(np.arange(size.past, size.total), shape)
        if given.role == BEAMS:
            self._require_room(given, shape[-1] == size.batch, size)
            return np.arange(size.batch)
        number = NUMBERS[given.role](size) if given.role in NUMBERS else 0
        return np.full(shape, number, _NUMPY_TYPES.get(given.type))

    def _require_room(self, given: GraphInput, fits: bool, size: TokenShape) -> None:
        if not fits:
            raise self.shapes.refuse(
                given, f"has shape {list(given.shape)}, not one for {size.batch} x {size.total} tokens"
            )

    def _mask(self, given: GraphInput, shape: tuple[int, ...], size: TokenShape) -> np.ndarray:
        """Return a mask over all keys [batch, keys], or over those of each query [batch, (1,) queries, keys]."""
        keys = np.arange(shape[-1]) - self.hidden_past
        self._require_room(given, len(keys) >= self.hidden_past + size.total, size)
        last = np.array([size.total - 1])
        if len(shape) > 2 and shape[-2] == size.length:
            last = np.arange(size.past, size.total)[:, None]
        seen = np.broadcast_to((keys >= 0) & (keys <= last), shape)
        dtype = _NUMPY_TYPES.get(given.type)
        if len(shape) == 2 or dtype is None or dtype.kind in "bui":
            return seen
        return np.where(seen, 0.0, _lowest(dtype))  # added to the scores


def as_declared(given: GraphInput, value: np.ndarray, shapes: InputShapes) -> Feed:
    """Return ``value`` in the declared type; numpy has no bfloat16 that ONNX Runtime takes, so that its bits go.

    Args:
        given: the input.
        value: what it shall hold, in any type.
        shapes: gives the fix where the input's type can't be fed.

    Raises:
        GraphError: the input has a type that numpy lacks.
    """
    dtype = _NUMPY_TYPES.get(given.type)
    if dtype is None:
        raise shapes.refuse(given, f"has type {given.type}, which can't be fed")
    with np.errstate(over="ignore"):  # what overflows float16 is named where it reaches a MatMul
        array = np.array(value, dtype, order="C")  # a copy, which torch may write to
    if given.type != _BFLOAT16:
        return array
    bits: ort.OrtValue = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ir.DataType.BFLOAT16)
    return bits


def as_values(feeds: Mapping[str, Feed]) -> dict[str, ort.OrtValue]:
    """Return ``feeds`` as a session takes them where some of them are ONNX Runtime's own values."""
    return {
        name: feed if isinstance(feed, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(feed)
        for name, feed in feeds.items()
    }


def _lowest(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The model that turns tokens into what a decoder takes in their place; images and sound are left empty."""

    file: Path
    feeds: CausalFeeds
    outputs: Mapping[str, str]
    """Its output for each input of the decoder."""

    def __call__(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return what it makes of ``tokens`` [batch, length], by the decoder's names.

        Raises:
            GraphError: ONNX Runtime stops.
        """
        try:
            made = self.feeds.session.run(list(self.outputs.values()), self.feeds(tokens))
        except Exception as error:  # onnxruntime raises classes without a common base
            raise GraphError(
                f"The embedding model {self.file} can't be run on text ({in_one_line(error)}); "
                f"{self.feeds.shapes.advice}."
            ) from error
        return dict(zip(self.outputs, made, strict=True))


def require_text_inputs(model: ir.Model, directory: ModelDirectory) -> WindowShape:
    """Check, before anything runs, that text gives all inputs of ``model``; return the windows that it takes.

    Raises:
        GraphError: an input can't be fed.
    """
    inputs = inputs_of_graph(model, directory)
    shapes = InputShapes.of(directory)
    embedded = _require_from_text(inputs, directory, shapes)
    window = WindowShape.of(inputs)
    size = TokenShape(window.batch or 1, window.length or 1)
    for given in inputs:
        if given.name not in embedded:
            shapes.shape(given, size)
    _hidden_past(inputs, directory, shapes)
    return window


def _require_from_text(inputs: Sequence[GraphInput], directory: ModelDirectory, shapes: InputShapes) -> dict[str, str]:
    """Return the output of the embedding model for each input that it makes; the others must come from text.

    Raises:
        GraphError: an input comes from neither.
    """
    made = {} if all(given.comes_from_text for given in inputs) else _outputs_of_embedding(directory)
    embedded = {given.name: made[key] for given in inputs for key in (given.role, given.name) if key in made}
    for given in inputs:
        if given.name in embedded:
            continue
        if given.role in EMBEDDED and shapes.open_size is None:
            where = "genai_config.json names none" if directory.embedding is None else directory.embedding.onnx_file
            raise GraphError(
                f"Graph input '{given.name}' needs the embedding model, which is missing ({where}); put it there and "
                f"name it as model.embedding.filename, or {shapes.advice}."
            )
        shapes.require_from_text(given)
    return embedded


def _outputs_of_embedding(directory: ModelDirectory) -> dict[str, str]:
    """Return the outputs of the embedding model by their names, and by their usual ones; none without such a model."""
    if directory.embedding is None or not directory.embedding.onnx_file.is_file():
        return {}
    try:
        graph = ir.load(directory.embedding.onnx_file).graph
    except Exception as error:  # protobuf and onnx-ir raise their own classes for damaged files
        raise GraphError(
            f"The embedding model {directory.embedding.onnx_file} can't be read ({in_one_line(error)}); build it again."
        ) from error
    names = {str(value.name): str(value.name) for value in graph.outputs}
    configured = {key: name for key, name in directory.embedding.output_names.items() if name in names}
    return (dict.fromkeys(EMBEDDED, next(iter(names))) if len(names) == 1 else {}) | names | configured


def _open_embedding(directory: ModelDirectory, outputs: Mapping[str, str], advice: str) -> Embedding:
    assert directory.embedding is not None, "it makes the outputs"
    file = directory.embedding.onnx_file
    with open_file(file, SessionSettings(map_weights=True, spin=False), None) as session:
        feeds = CausalFeeds.of(session, directory.embedding, open_size=0, advice=advice)
    return Embedding(file=file, feeds=feeds, outputs=outputs)


def _hidden_past(inputs: Sequence[GraphInput], directory: ModelDirectory, shapes: InputShapes) -> int:
    """Return how many places of caches of fixed length lie before the tokens' own, for masks to hide.

    None do where GroupQueryAttention reads the cache, or where the mask covers no more than the cache: then tokens are
    written into it, at their positions.
    """
    mask = next((given for given in inputs if given.role == MASK), None)
    caches = [given for given in inputs if given.holds_keys_or_values]
    if mask is None and not caches:
        return 0
    if mask is None or not caches:  # what runs may be a part of the graph, and the other lie in another part
        inputs = _inputs_of_file(directory) or inputs
        mask = next((given for given in inputs if given.role == MASK), None)
        caches = [given for given in inputs if given.holds_keys_or_values]
    fixed = {
        given.name: size
        for given in caches
        if isinstance(size := given.shape[2], int) and size and given.name not in shapes.windowed_caches
    }
    if not fixed or fixed.keys() & shared_caches(directory.onnx_file):
        return 0
    past = max(fixed.values())
    if mask is None:
        if shapes.open_size is None and not any(given.role in TELL_LENGTH for given in inputs):
            cache = next(given for given in caches if given.name in fixed)
            raise shapes.refuse(cache, f"always holds {past} tokens, and no attention_mask hides them")
        return 0
    covered = mask.shape[-1] if mask.shape else None
    return 0 if isinstance(covered, int) and covered <= past else past


def _inputs_of_file(directory: ModelDirectory) -> tuple[GraphInput, ...]:
    try:
        model = ir.load(directory.onnx_file)
    except Exception:  # load_graph says what is wrong with the file
        return ()
    return inputs_of_graph(model, directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFeeds:
    """The inputs of an open session for samples that all hold the same inputs."""

    session: ort.InferenceSession
    inputs: tuple[GraphInput, ...]
    """Those that samples give."""
    shapes: InputShapes
    others: CausalFeeds | None
    """Gives what follows from the tokens; None where samples give everything."""
    tokens: str | None
    """The name of the token ids in a sample, if it has any."""

    @classmethod
    def of(
        cls,
        session: ort.InferenceSession,
        directory: ModelDirectory,
        fed_otherwise: frozenset[str] = frozenset(),
        *,
        names: frozenset[str],
    ) -> SampleFeeds:
        """Return the feeds of a session whose model, or a part of it, lies in ``directory``.

        Args:
            session: the open session.
            directory: names inputs as genai_config.json does.
            fed_otherwise: inputs that the caller feeds.
            names: the inputs that every sample holds.

        Raises:
            GraphError: an input is neither in the samples nor follows from their tokens.
        """
        known = tuple(given for given in inputs_of_session(session, directory) if given.name not in fed_otherwise)
        lacking = [given for given in known if given.name not in names]
        others = None
        tokens = token_input(names, directory)
        if lacking:
            _require_tokens(lacking, names, tokens)
            others = CausalFeeds.of(session, directory, fed_otherwise=fed_otherwise | names)
        return cls(
            session=session,
            inputs=tuple(given for given in known if given.name in names),
            shapes=InputShapes.of(directory),
            others=others,
            tokens=tokens,
        )

    def __call__(self, sample: Sample) -> dict[str, Feed]:
        """Return the feeds for a sample.

        Raises:
            GraphError: an input has a type that can't be fed.
        """
        feeds = {given.name: as_declared(given, sample[given.name], self.shapes) for given in self.inputs}
        if self.others is None:
            return feeds
        assert self.tokens is not None, "it was checked"
        return self.others(sample[self.tokens]) | feeds


def require_sample_inputs(model: ir.Model, directory: ModelDirectory, names: frozenset[str]) -> None:
    """Check, before anything runs, that samples that hold the inputs ``names`` give all inputs of ``model``.

    Raises:
        GraphError: an input is neither among them nor follows from their tokens.
    """
    lacking = [given for given in inputs_of_graph(model, directory) if given.name not in names]
    if lacking:
        _require_tokens(lacking, names, token_input(names, directory))
        shapes = InputShapes.of(directory)
        for given in lacking:
            shapes.require_from_text(given)


def _require_tokens(lacking: list[GraphInput], names: Collection[str], tokens: str | None) -> None:
    if tokens is None:
        raise GraphError(
            f"Graph input '{lacking[0].name}' has no default and isn't in the samples, which hold "
            f"{', '.join(sorted(names)) or 'no input of the graph'}; give every input in .npz files, by its name."
        )

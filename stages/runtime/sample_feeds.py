"""Make the inputs of any graph from samples, which give them by name: for encoders, projectors, embedding models.

A sample may hold token ids without their mask, positions and the like: these follow from the tokens, as in a decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.runtime.feeds import CausalFeeds, Feed, as_declared
from stages.runtime.graph_inputs import GraphInput, InputShapes, inputs_of_graph, inputs_of_session, token_input

Sample: TypeAlias = Mapping[str, np.ndarray]
"""What a graph's inputs hold in one run, by their names, in any numeric type."""
Batch: TypeAlias = "np.ndarray | Sample"
"""What a graph is run on at a time: token ids [batch, length], or a sample."""


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

"""Make samples of a decoder that reads what the package's encoder makes of sounds: tokens, and the encoder's outputs.

The tokens are those of a transcript beside the sound, or what the base writes of it, the most likely token each time.
The encoder's outputs take a hundred times the memory of a sound's features, so that they are computed for each run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.calibration.samples.samples import ComputedSample
from stages.calibration.text.tokenizer import tokenizer_of
from stages.commands.calibrate_options import TextOptions
from stages.errors import GraphError, UserError, in_one_line
from stages.model.directory import ModelDirectory, locate_model
from stages.model.genai_config import component_files, end_tokens_of, read_genai_config
from stages.model.load import read_graph
from stages.runtime.cpu.runnable import open_file
from stages.runtime.decoder import Decoder, open_decoder
from stages.runtime.feeds import Sample, SampleFeeds, as_values
from stages.runtime.graph_inputs import TOKENS, inputs_of_graph
from stages.runtime.session import SessionSettings, runtime_reason

_ENCODER = "encoder"
_HANDED_ON: Mapping[str, str] = {
    "cross_past_key_names": "cross_present_key_names",
    "cross_past_value_names": "cross_present_value_names",
    "encoder_hidden_states": "encoder_hidden_states",
}
"""The encoder's outputs by the decoder's inputs, as genai_config.json calls both."""
_START = "<|startoftranscript|>"
"""What Whisper begins with, where genai_config.json doesn't say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageEncoder:
    """The encoder of a package, and which of its outputs its decoder reads."""

    directory: ModelDirectory
    graph: ir.Model
    outputs: Mapping[str, str]
    """Its output for each of the decoder's inputs."""


def find_encoder(model: ir.Model, directory: ModelDirectory) -> PackageEncoder | None:
    """Return the encoder whose outputs ``model`` reads besides tokens; None where it reads none.

    Args:
        model: a decoder's graph.
        directory: where it lies.
    """
    if not directory.has_genai_config or directory.component == _ENCODER:
        return None
    if _ENCODER not in component_files(read_genai_config(directory.folder)):
        return None
    encoder = locate_model(directory.folder, _ENCODER)
    graph = read_graph(encoder.onnx_file)
    made = {str(value.name) for value in graph.graph.outputs}
    outputs = {
        given.name: found
        for given in inputs_of_graph(model, directory)
        if (found := _output_for(given.name, directory, encoder)) in made
    }
    return PackageEncoder(directory=encoder, graph=graph, outputs=outputs) if outputs else None


def _output_for(given: str, decoder: ModelDirectory, encoder: ModelDirectory) -> str:
    """Return what the encoder calls the decoder's input ``given``; empty where it is none of its outputs."""
    for key, theirs in _HANDED_ON.items():
        ours, name = decoder.input_names.get(key), encoder.output_names.get(theirs)
        if ours is None or name is None:
            continue
        layer = re.fullmatch(re.escape(ours).replace("%d", r"(\d+)"), given)
        if layer is not None:
            return name % int(layer[1]) if "%d" in name else name
    return ""


def encoded_samples(
    files: Sequence[Path],
    features: Iterator[Sample],
    encoder: PackageEncoder,
    config: TextOptions,
    model: ir.Model,
    directory: ModelDirectory,
) -> Iterator[Sample]:
    """Yield a sample of each sound.

    Args:
        files: the sounds; a .txt file of the same name beside one is its transcript.
        features: what the encoder reads of each.
        encoder: the package's.
        config: names the tokenizer, and the most tokens.
        model: the decoder's graph.
        directory: where it lies.

    Raises:
        UserError: the decoder has no input of tokens, nothing tells its first token, or ONNX Runtime stops.
    """
    tokens = next((given.name for given in inputs_of_graph(model, directory) if given.role == TOKENS), None)
    if tokens is None:
        raise UserError(f"{directory.onnx_file} reads no tokens; pass .npz files with all of its inputs.")
    session = _EncoderSession(encoder=encoder)
    with open_decoder(directory, SessionSettings(), None, frozenset(encoder.outputs)) as decoder:
        writer = _Writer.of(decoder, config, directory)
        for file, own in zip(files, features, strict=True):
            written = writer.tokens(file, session.run(own))
            yield ComputedSample(
                own=own,
                known={tokens: np.array([written], np.int64)},
                computed=tuple(encoder.outputs),
                compute=session.run,
            )


@dataclass(slots=True, kw_only=True)
class _EncoderSession:
    """The encoder, open from its first run on; it remembers what it made last."""

    encoder: PackageEncoder
    _feeds: SampleFeeds | None = None
    _last: tuple[Sample, dict[str, np.ndarray]] | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def run(self, own: Sample) -> dict[str, np.ndarray]:
        """Return what the decoder reads of a sound's features, by the decoder's names.

        Raises:
            UserError: ONNX Runtime stops.
        """
        if self._last is None or self._last[0] is not own:
            self._last = own, self._computed(own)
        return self._last[1]

    def _computed(self, own: Sample) -> dict[str, np.ndarray]:
        directory, names = self.encoder.directory, self.encoder.outputs
        if self._feeds is None:
            opened = self._open.enter_context(open_file(directory.onnx_file, SessionSettings(), None))
            self._feeds = SampleFeeds.of(opened, directory, names=frozenset(own))
        try:
            made = self._feeds.session.run_with_ort_values(list(names.values()), as_values(self._feeds(own)))
        except GraphError:
            raise
        except Exception as error:  # onnxruntime raises classes without a common base
            raise UserError(
                f"ONNX Runtime can't run {directory.onnx_file} on the samples ({runtime_reason(error)}); pass .npz "
                "files with what the decoder reads."
            ) from error
        return {name: value.numpy() for name, value in zip(names, made, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Gives the tokens of a sound."""

    decoder: Decoder
    start: int
    end: frozenset[int]
    most: int
    """Tokens of one sound."""
    config: TextOptions

    @classmethod
    def of(cls, decoder: Decoder, config: TextOptions, directory: ModelDirectory) -> _Writer:
        content = read_genai_config(directory.folder)
        said = content.get("model", {})
        start = said.get("decoder_start_token_id")
        if start is None:
            start = _start_of_tokenizer(config, directory, said.get("bos_token_id"))
        return cls(
            decoder=decoder,
            start=int(start),
            end=end_tokens_of(content),
            most=min(config.seq_len, directory.context_length or config.seq_len),
            config=config,
        )

    def tokens(self, sound: Path, encoded: Mapping[str, np.ndarray]) -> list[int]:
        """Return the tokens of the transcript, or those that the decoder writes: the first one, and up to the end."""
        transcript = sound.with_suffix(".txt")
        if transcript.is_file():
            return self._read(transcript)
        heard = replace(self.decoder, others=as_values(encoded))
        written = [self.start]
        for token in islice(heard.continuation(written), self.most - 1):
            written.append(token)
            if token in self.end:
                break
        return written

    def _read(self, transcript: Path) -> list[int]:
        try:
            text = transcript.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(
                f"The transcript {transcript} can't be read ({in_one_line(error)}); save it as UTF-8."
            ) from error
        ids: list[int] = tokenizer_of(self.config, self.decoder.directory).tokenizer(text)["input_ids"]
        return (ids if ids[:1] == [self.start] else [self.start, *ids])[: self.most]


def _start_of_tokenizer(config: TextOptions, directory: ModelDirectory, otherwise: int | None) -> int:
    """Return the token that Whisper's transcripts begin with, where the tokenizer has it."""
    try:
        known = tokenizer_of(config, directory).tokenizer.get_vocab()
    except UserError:
        known = {}
    start = known.get(_START, otherwise)
    if start is None:
        raise UserError(
            f"Nothing tells the first token of {directory.folder}; write it into genai_config.json as "
            "model.decoder_start_token_id."
        )
    return int(start)

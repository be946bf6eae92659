"""Make a sample of each document, as an encoder of text reads it: with the tokenizer's own special tokens, unpacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from stages.calibration.samples.samples import DEFAULT_SAMPLES, MOST_UNSEEN, Samples, count_samples, split_samples
from stages.calibration.text.documents import open_documents
from stages.calibration.text.mix import RANDOM, SELF_GENERATED, dataset_names, windows_by_dataset
from stages.calibration.text.tokenizer import load_tokenizer, tokenizer_of
from stages.commands.calibrate_options import TextOptions
from stages.errors import UserError
from stages.model.directory import ModelDirectory, has_logits
from stages.runtime.feeds import Sample
from stages.runtime.graph_inputs import MASK, STATE, TOKENS, WindowShape, inputs_of_graph

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 16
"""More than in any usual text: a longer document is cut here before it is tokenized, and then to the tokens wanted."""
_MADE = ("attention_mask", "token_type_ids")
"""What a tokenizer makes besides the ids; of documents that aren't padded, the ids give it."""


def reads_documents(model: ir.Model, directory: ModelDirectory) -> bool:
    """Return whether the graph encodes texts one by one: from tokens and a mask, with neither logits nor a cache."""
    roles = {given.role for given in inputs_of_graph(model, directory)}
    outputs = (str(value.name) for value in model.graph.outputs)
    return {TOKENS, MASK} <= roles and STATE not in roles and not has_logits(outputs, directory)


def document_samples(
    config: TextOptions,
    model: ir.Model,
    directory: ModelDirectory,
    dataset: str,
) -> Samples:
    """Return documents of the data sets as samples, each cut to ``config.seq_len`` tokens or what the model takes.

    Args:
        config: names the tokenizer, and gives the number and length of documents.
        model: the graph, of which ``reads_documents`` holds.
        directory: where it lies; its folder's tokenizer is used where none is named.
        dataset: the data sets, separated by commas.

    Raises:
        UserError: the data or the tokenizer can't be read, or there are too few documents.
    """
    if config.apply_chat_template:
        raise UserError(
            "--apply_chat_template is for models that write text, and this one encodes documents; leave it out."
        )
    for name in dataset_names(dataset):
        if name in (SELF_GENERATED, RANDOM):
            raise UserError(f"--dataset {name} is for models that write text, and this one encodes it; pass another.")
    found = tokenizer_of(config, directory)
    encode = _Encoder.of(model, directory, found.tokenizer, config.seq_len)
    wanted = (config.calib_size or DEFAULT_SAMPLES) + MOST_UNSEEN
    samples: list[Sample] = []
    titles: list[str] = []
    for name, share in windows_by_dataset(dataset, wanted, without=(SELF_GENERATED, RANDOM)).items():
        documents = open_documents(name, config.seed)
        titles.append(documents.title)
        texts = (text for text in documents.texts if isinstance(text, str) and text.strip())
        samples += map(encode, islice(texts, share))
    counts = count_samples(len(samples), config.calib_size, f"--dataset {dataset}")
    order = np.random.default_rng(config.seed).permutation(len(samples))[: counts.total]
    return split_samples((samples[place] for place in order), counts, source=" + ".join(titles), tokenizer=found.title)


def encode_documents(
    texts: Iterable[str], model: ir.Model, directory: ModelDirectory, tokenizer: str, seq_len: int
) -> list[Sample]:
    """Return a sample of each text.

    Args:
        texts: the documents.
        model: the graph, of which ``reads_documents`` holds.
        directory: where it lies.
        tokenizer: a folder or hub name.
        seq_len: the most tokens of each.

    Raises:
        UserError: the tokenizer can't be loaded.
    """
    encode = _Encoder.of(model, directory, load_tokenizer(tokenizer), seq_len)
    return [encode(text) for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoder:
    """Tokenizes one document at a time."""

    tokenizer: PreTrainedTokenizerBase
    names: Mapping[str, str]
    """The graph's input for each array that a tokenizer makes."""
    length: int
    """The most tokens."""
    padded: bool
    """Whether the graph takes no fewer."""

    @classmethod
    def of(
        cls, model: ir.Model, directory: ModelDirectory, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> _Encoder:
        inputs = inputs_of_graph(model, directory)
        fixed = WindowShape.of(inputs).length
        if fixed is not None and tokenizer.pad_token_id is None:
            raise UserError(
                f"The graph takes {fixed} tokens at a time, and the tokenizer of {directory.folder} has none to pad "
                "with; build it with a length of any size."
            )
        names = {_MADE[0]: MASK, "input_ids": TOKENS, _MADE[1]: _MADE[1]}
        return cls(
            tokenizer=tokenizer,
            names={made: given.name for made, role in names.items() for given in inputs if given.role == role},
            length=fixed or min(seq_len, tokenizer.model_max_length, directory.context_length or seq_len),
            padded=fixed is not None,
        )

    def __call__(self, text: str) -> Sample:
        begin = (
            text[: _CHARACTERS_PER_TOKEN * self.length].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
        made = self.tokenizer(
            begin, truncation=True, max_length=self.length, padding="max_length" if self.padded else False
        )
        return {name: np.array([made[key]], np.int64) for key, name in self.names.items() if key in made}

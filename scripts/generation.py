"""Greedy text from an ORT-GenAI model folder, through onnxruntime-genai."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnxruntime_genai as og

from stages.errors import UserError
from stages.model_directory import GENAI_CONFIG, locate_model

_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\n")


def generate_sentence(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer: up to its first sentence's end, its end token, or ``max_new_tokens``.

    ``prompt`` is wrapped in the model's chat template where the folder has one.

    Raises:
        UserError: the folder isn't an ORT-GenAI model, or the runtime can't run it here.
    """
    if not locate_model(folder).has_genai_config:
        raise UserError(f"--model {folder} has no {GENAI_CONFIG}; pass a folder that onnxruntime-genai can run.")
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
        if _has_template(folder):
            prompt = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": prompt}]))
        return until_sentence_end(_pieces(model, tokenizer, prompt, max_new_tokens))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {folder} can't be run by onnxruntime-genai here ({reason}); "
            "pass a model built for this machine's execution provider."
        ) from error


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def _pieces(model: og.Model, tokenizer: og.Tokenizer, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """Decoded text, one token at a time."""
    tokens = tokenizer.encode(prompt)
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + max_new_tokens, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(tokens)
    decoder = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        yield decoder.decode(generator.get_next_tokens()[0])


def until_sentence_end(pieces: Iterable[str]) -> str:
    """Join ``pieces`` as far as the first full stop, question or exclamation mark before a space, or blank line."""
    text = ""
    for piece in pieces:
        text += piece
        end = _SENTENCE_END.search(text)
        if end is not None:
            return text[: end.end()].strip()
    return text.strip()

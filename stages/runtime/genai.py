"""A model folder opened in onnxruntime-genai, the runtime that ships it. The package is optional."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import UserError
from stages.model.genai_config import GENAI_CONFIG

_TEMPLATE = "chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenaiSession:
    """An open model with its tokenizer."""

    folder: Path
    runtime: ModuleType
    """onnxruntime_genai."""
    model: Any
    tokenizer: Any
    has_template: bool
    """Whether the folder has a chat template."""

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Token ids of a user's message, in the chat template where there is one."""
        if self.has_template:
            prompt = self.tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": prompt}]))
        return [int(token) for token in self.tokenizer.encode(prompt)]

    def text(self, tokens: Sequence[int]) -> str:
        """What token ids stand for."""
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def greedy(self, tokens: Sequence[int], limit: int, *, past_the_end: bool = False) -> Iterator[int]:
        """The most likely next tokens, up to the model's end token or ``limit``; ``past_the_end`` to ``limit``.

        Everything is computed when it is asked for: the prompt with the first token.
        """
        settings = self.runtime.GeneratorParams(self.model)
        length = len(tokens) + limit
        settings.set_search_options(
            max_length=length, min_length=length if past_the_end else 0, do_sample=False, num_beams=1
        )
        generator = self.runtime.Generator(self.model, settings)
        generator.append_tokens(list(tokens))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def open_genai(folder: Path, option: str, threads: int | None = None) -> GenaiSession:
    """Open the model in ``folder``; ``threads`` replaces what its genai_config.json says.

    Args:
        folder: the model.
        option: the command-line option that named it, for messages.
        threads: threads of ONNX Runtime; None leaves them.

    Raises:
        UserError: onnxruntime-genai isn't installed, or the folder is no ORT-GenAI model, or can't be run here.
    """
    require_genai([folder], option)
    runtime = _runtime(option)
    try:
        config = runtime.Config(str(folder))
        if threads is not None:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        model = runtime.Model(config)
        tokenizer = runtime.Tokenizer(model)
    except RuntimeError as error:
        raise cannot_run(folder, option, error) from error
    return GenaiSession(
        folder=folder, runtime=runtime, model=model, tokenizer=tokenizer, has_template=_has_template(folder)
    )


def require_genai(folders: Sequence[Path], option: str) -> None:
    """Raise UserError where onnxruntime-genai isn't installed, or a folder lacks its configuration."""
    _runtime(option)
    for folder in folders:
        if not (folder / GENAI_CONFIG).is_file():
            raise UserError(f"{option} {folder} has no {GENAI_CONFIG}; pass a folder that onnxruntime-genai can run.")


def cannot_run(folder: Path, option: str, error: RuntimeError) -> UserError:
    """The runtime's ``error`` as a sentence."""
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{option} {folder} can't be run by onnxruntime-genai here ({reason}); "
        "pass a model built for this machine's execution provider."
    )


def runtime_version(option: str) -> str:
    """Name and version of the installed runtime."""
    return f"onnxruntime-genai {_runtime(option).__version__}"


def _runtime(option: str) -> ModuleType:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UserError(
            f"{option} needs onnxruntime-genai, which can't be imported ({error}): pip install onnxruntime-genai."
        ) from error
    module: ModuleType = onnxruntime_genai
    return module


def _has_template(folder: Path) -> bool:
    if (folder / f"{_TEMPLATE}.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and _TEMPLATE in json.loads(config.read_text(encoding="utf-8"))

"""Open a model folder in onnxruntime-genai, the runtime that it is made for, and generate tokens with it.

The package is optional. Nothing heavy is imported here: the speed test measures the memory of processes that do so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import UserError, in_one_line, with_class_name
from stages.model.genai_config import GENAI_CONFIG, read_genai_model
from stages.system.paths import from_here
from stages.system.threads import usable_threads

Message = Mapping[str, str]
"""One message of a conversation: its ``role`` (system, user, assistant) and its ``content``."""

_TEMPLATE, _TOKENIZER = "chat_template", "tokenizer.json"
_UNKNOWN_CONTEXT = 2048
"""Tokens of context where genai_config.json doesn't say."""
_CPU = "cpu"
_RECIPE, _WEIGHTS = "recipe.json", ".weights"
"""What a folder of quantized weights holds, and how its name ends unless it was given another."""
_LACKS_OUTPUT = "output was not found"
"""Words of onnxruntime-genai about an output that genai_config.json names and the graph lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenaiSession:
    """An open model with its tokenizer."""

    runtime: ModuleType
    """onnxruntime_genai."""
    model: Any
    tokenizer: Any
    has_template: bool
    """Whether the folder has a chat template."""
    begins_with: int | None
    """The token that the tokenizer puts before any text, which onnxruntime-genai's leaves out; None: none. Templates
    write their own."""
    context_length: int
    """The most tokens of a prompt and its answer together."""
    sliding_window: int = 0
    """Tokens that the cache must have room for: GroupQueryAttention refuses one smaller than its window; 0: any."""

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Return the token ids of a user's message, in the chat template where there is one."""
        return self.conversation_tokens([{"role": "user", "content": prompt}])

    def conversation_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of ``messages`` in the chat template; without one, of their texts, each on its line.

        Bytes that are no UTF-8, which come from pipes and command lines as half characters, are read as question marks.

        Raises:
            UserError: the template refuses them.
        """
        if not self.has_template:
            prompt = "\n".join(message["content"] for message in messages)
        else:
            try:
                prompt = self.tokenizer.apply_chat_template(json.dumps(messages))
            except RuntimeError as error:
                hint = "leave out --system" if messages[0]["role"] == "system" else "use a model with another template"
                raise UserError(
                    f"The model's chat template can't be applied ({in_one_line(error)}); {hint}."
                ) from error
        tokens = [int(token) for token in self.tokenizer.encode(prompt.encode("utf-8", "replace").decode("utf-8"))]
        if self.begins_with is None or tokens[:1] in ([], [self.begins_with]):
            return tokens
        return [self.begins_with, *tokens]

    def text(self, tokens: Sequence[int]) -> str:
        """Return what token ids stand for."""
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def generate(
        self, tokens: Sequence[int], limit: int, *, past_the_end: bool = False, temperature: float = 0.0
    ) -> Iterator[int]:
        """Yield the next tokens, each computed when it is asked for, the prompt with the first.

        Args:
            tokens: token ids of the prompt.
            limit: the most tokens that are generated.
            past_the_end: whether generation goes on behind the model's end token.
            temperature: of sampling; 0 takes the most likely token.
        """
        settings = self.runtime.GeneratorParams(self.model)
        length = max(len(tokens) + limit, self.sliding_window)
        sampling = {"temperature": temperature} if temperature else {}
        settings.set_search_options(
            max_length=length,
            min_length=length if past_the_end else 0,
            do_sample=temperature > 0,
            num_beams=1,
            **sampling,
        )
        generator = self.runtime.Generator(self.model, settings)
        generator.append_tokens(list(tokens))
        for _ in range(limit):
            if generator.is_done():
                return
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def open_genai(folder: Path, option: str, threads: int | None = None) -> GenaiSession:
    """Open the model in ``folder`` with its tokenizer.

    Args:
        folder: the model.
        option: the command-line option that named it, for messages.
        threads: see ``load_genai``.

    Raises:
        UserError: onnxruntime-genai isn't installed, or the folder is no ORT-GenAI model, or can't be run here.
    """
    require_genai([folder], option)
    runtime = import_genai(option)
    described = read_genai_model(folder)
    try:
        model = load_genai(runtime, folder, threads=threads)
    except RuntimeError as error:
        raise cannot_run(folder, option, error) from error
    try:
        tokenizer = runtime.Tokenizer(model)
    except RuntimeError as error:
        raise UserError(
            f"{option} {folder} has no tokenizer that onnxruntime-genai can read ({in_one_line(error)}); "
            f"{_tokenizer_fix(folder)}."
        ) from error
    has_template = has_chat_template(folder)
    return GenaiSession(
        runtime=runtime,
        model=model,
        tokenizer=tokenizer,
        has_template=has_template,
        begins_with=None if has_template else _first_token(folder),
        context_length=described.context_length or _UNKNOWN_CONTEXT,
        sliding_window=described.decoder.window_size,
    )


def _first_token(folder: Path) -> int | None:
    """Return the token that the tokenizer in ``folder`` puts before an empty text."""
    if not (folder / _TOKENIZER).is_file():
        return None
    from tokenizers import Tokenizer

    tokens: list[int] = Tokenizer.from_file(str(folder / _TOKENIZER)).encode("").ids
    return tokens[0] if tokens else None


def _tokenizer_fix(folder: Path) -> str:
    if not (folder / "tokenizer.model").is_file():
        return "copy tokenizer.json and tokenizer_config.json into it"
    made = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    command = f'python -c "from transformers import AutoTokenizer; {made}"'
    return f"make tokenizer.json of its tokenizer.model (pip install sentencepiece first): {command}"


def load_genai(
    runtime: ModuleType,
    folder: Path,
    *,
    threads: int | None = None,
    filename: str | None = None,
    end_token: int | None = None,
    provider: str | None = None,
) -> object:
    """Load the model in ``folder``; what is given replaces what its genai_config.json says.

    Args:
        runtime: onnxruntime_genai.
        folder: the model.
        threads: threads of ONNX Runtime; None: as ``usable_threads`` says. Left to itself, onnxruntime-genai takes half
            of what the machine runs at once: of the cores, where none runs two threads.
        filename: the .onnx file in ``folder``.
        end_token: the token at which generation ends, taken for padding too.
        provider: the only execution provider, as onnxruntime-genai names it (cpu, cuda, ...).

    Raises:
        RuntimeError: onnxruntime-genai can't load it here.
    """
    decoder: dict[str, object] = {"session_options": {"intra_op_num_threads": threads or usable_threads()}}
    if filename is not None:
        decoder["filename"] = filename
    overlay: dict[str, object] = {"decoder": decoder}
    if end_token is not None:
        overlay |= {"eos_token_id": end_token, "pad_token_id": end_token}
    config = runtime.Config(str(folder))
    config.overlay(json.dumps({"model": overlay}))
    if provider is not None:
        config.clear_providers()
        if provider != _CPU:
            config.append_provider(provider)
    model: object = runtime.Model(config)
    return model


def import_genai(option: str) -> ModuleType:
    """Return the module onnxruntime_genai.

    Raises:
        UserError: it can't be imported; ``option`` is what needs it.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UserError(
            f"{option}: onnxruntime-genai can't be imported ({with_class_name(error)}); install it with 'pip install "
            "onnxruntime-genai' (on CUDA onnxruntime-genai-cuda)."
        ) from error
    runtime: ModuleType = onnxruntime_genai
    return runtime


def require_genai(folders: Sequence[Path], option: str) -> None:
    """Raise UserError where onnxruntime-genai isn't installed, or a folder lacks its configuration."""
    import_genai(option)
    for folder in folders:
        if (folder / _RECIPE).is_file():
            model = from_here(folder.with_name(folder.name.removesuffix(_WEIGHTS)))
            hint = f"the model is {model}" if model != folder and model.is_dir() else "pass the model made from them"
            raise UserError(f"{option} {folder} holds quantized weights, no model; {hint}.")
        if not (folder / GENAI_CONFIG).is_file():
            fault = f"has no {GENAI_CONFIG}" if folder.exists() else "does not exist"
            fix = "copy it and the tokenizer's files from the base's folder (Olive leaves them out), or pass"
            raise UserError(f"{option} {folder} {fault}; {fix if folder.exists() else 'pass'} another folder.")


def why_not_genai(folders: Sequence[Path]) -> str | None:
    """Return why onnxruntime-genai can't run some models, as far as that is known without loading them, or None."""
    places = [path.parent if path.suffix == ".onnx" else path for path in folders]
    try:
        require_genai(places, "")
    except UserError as error:
        return str(error).lstrip(": ").partition(";")[0]
    return None


def cannot_run(folder: Path, option: str, error: RuntimeError) -> UserError:
    """Return the runtime's ``error`` as a sentence.

    Args:
        folder: the model.
        option: the command-line option that named it.
        error: what onnxruntime-genai raised.
    """
    fix = "pass a model built for this machine's execution provider."
    if _LACKS_OUTPUT in str(error):
        fix = (
            f"write the graph's own name into model.decoder.outputs of its {GENAI_CONFIG} (Olive's quantizers rename "
            "logits to logits_Q4 or logits_Q8)."
        )
    return UserError(f"{option} {folder} can't be run by onnxruntime-genai here ({in_one_line(error)}); {fix}")


def runtime_version(option: str) -> str:
    """Return name and version of the installed runtime, which ``option`` needs."""
    return f"onnxruntime-genai {import_genai(option).__version__}"


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer in ``folder`` has a chat template."""
    if (folder / f"{_TEMPLATE}.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and _TEMPLATE in json.loads(config.read_text(encoding="utf-8"))

"""Chat with a model in onnxruntime-genai, or let it answer one prompt: ``python -m stages.chat MODEL``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import ChatConfig
from stages.commands.output import Section, unwrapped, write_out
from stages.commands.run import run_command
from stages.errors import UserError, sentence_of

if TYPE_CHECKING:
    from stages.runtime.conversation import Conversation

_LOGGER = logging.getLogger(__name__)
_OPTION = "MODEL"
_ASKING = "you: "


def command(config: ChatConfig) -> Iterator[Section]:
    """Answer ``config.prompt``, or what a person types until the end of input; text goes out as it is generated.

    Raises:
        UserError: the model can't be run here, or the prompt doesn't fit into its context.
    """
    from stages.commands.progress import status
    from stages.runtime.conversation import Conversation
    from stages.runtime.genai import cannot_run, open_genai, require_genai

    folder = config.model.parent if config.model.suffix == ".onnx" else config.model
    require_genai([folder], _OPTION)
    with status(f"loading {folder.absolute().name}"):
        session = open_genai(folder, _OPTION)
    conversation = Conversation(
        session, system=config.system, max_new_tokens=config.max_new_tokens, temperature=config.temperature
    )
    if not session.has_template:
        _LOGGER.info("the model has no chat template: it continues the text")
    try:
        if config.prompt is None:
            _talk(conversation)
        elif config.printing.json:
            answer = "".join(conversation.answer(config.prompt))
            yield Section(name="answer", table=unwrapped(answer), record=answer)
        else:
            _answer(conversation, config.prompt)
    except RuntimeError as error:
        raise cannot_run(folder, _OPTION, error) from error


def _talk(conversation: Conversation) -> None:
    """Answer line by line until the end of input, or Ctrl-C while a person writes."""
    asking = _ASKING if sys.stdin.isatty() else ""
    if asking:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - lets input() edit lines and recall earlier ones
        _LOGGER.info("Ctrl-C stops an answer; Ctrl-D ends the chat.")
    while True:
        try:
            message = input(asking).strip()
        except (EOFError, KeyboardInterrupt):
            if asking:
                _print_now("\n")
            return
        try:
            if message:
                _answer(conversation, message)
        except KeyboardInterrupt:
            _print_now("\n")
        except UserError as error:
            _LOGGER.warning("%s", sentence_of(error))


def _answer(conversation: Conversation, message: str) -> None:
    # Closed at once where the block is interrupted, so that the conversation keeps what was written.
    with closing(conversation.answer(message)) as pieces:
        for piece in pieces:
            _print_now(piece)
    _print_now("\n")
    if conversation.cut_because:
        _LOGGER.info("the answer ends here: %s", conversation.cut_because)


def _print_now(text: str) -> None:
    """Print ``text`` at once; what the terminal's encoding doesn't have becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    write_out(text.encode(encoding, "replace").decode(encoding))


if __name__ == "__main__":
    run_command(ChatConfig, command, "python -m stages.chat")

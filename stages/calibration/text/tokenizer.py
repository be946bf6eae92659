"""Load the model's tokenizer from a folder or the hub, or from the model's own folder where the hub can't give it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from stages.commands.calibrate_options import TextOptions
from stages.errors import UserError, with_class_name
from stages.model.directory import ModelDirectory
from stages.model.load import is_lfs_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 10.0
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (*_SENTENCEPIECE, "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")
"""The first line of a vocabulary of tiktoken: some also call it tokenizer.model."""
_NAME_ANOTHER = "pass a folder that has one, or the model's hub name, as --model_name"
_CHARACTERS_PER_TOKEN = 8
"""Twice the usual, so that a text's beginning hardly ever has to be tokenized again."""
_CHANGED_BY_A_CUT = 64
"""Tokens before the place where a text is cut that may differ from those of the whole; few really do."""


def why_unreachable(name: str, kind: Literal["model", "dataset"], seconds: float = _SECONDS) -> str | None:
    """Return why the hub doesn't answer, or None where it does, whatever it answers about ``name``.

    None too where HF_HUB_OFFLINE is set: the libraries then look only at what they keep in HF_HOME, at once.

    Args:
        name: of a repository on the hub.
        kind: of that repository.
        seconds: how long the hub may take to answer.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=seconds)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return None
    except Exception as error:  # the HTTP library's own classes, which change with its version
        return f"the Hugging Face hub can't be reached, {with_class_name(error)}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTokenizer:
    """A tokenizer, and the folder or hub name it came from."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    title: str
    """The source in words: with the reason, where it stands in for another."""


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the first ``count`` tokens of ``text``, or as many as there are; hardly more than those are computed.

    Halves of characters, which escapes in JSON can leave, become the character for what can't be read.

    Args:
        tokenizer: the model's.
        text: of any length.
        count: how many tokens are needed.
        add_special_tokens: whether those that the tokenizer puts around texts are among them.
    """
    characters = _CHARACTERS_PER_TOKEN * (count + _CHANGED_BY_A_CUT)
    while True:
        begin = text[:characters].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # verbose warns of texts longer than the model's context; windows are cut afterwards.
        ids: list[int] = tokenizer(begin, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if characters >= len(text) or len(ids) >= count + _CHANGED_BY_A_CUT:
            return ids[:count]
        characters *= 4


class _CannotLoad(Exception):
    """Carries the reason, in words."""

    def __init__(self, reason: str, fix: str = _NAME_ANOTHER) -> None:
        super().__init__(reason)
        self.fix = fix


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name, whose own Python code doesn't run.

    Raises:
        UserError: there is none, or it can't be loaded.
    """
    return find_tokenizer(path, None, trust_remote_code=False).tokenizer


def tokenizer_of(config: TextOptions, directory: ModelDirectory) -> FoundTokenizer:
    """Return the tokenizer that ``config`` names; where that is none, or the hub can't give it, the model's own.

    Raises:
        UserError: neither can be loaded.
    """
    own = str(directory.folder)
    return find_tokenizer(config.model_name or own, own, trust_remote_code=config.trust_remote_code)


def find_tokenizer(path: str, stand_in: str | None, *, trust_remote_code: bool) -> FoundTokenizer:
    """Return the tokenizer of ``path`` or, where that is a hub name that can't be loaded, the one of ``stand_in``.

    Args:
        path: a folder or hub name.
        stand_in: another folder; None: there is none.
        trust_remote_code: whether the tokenizer's own Python code may run.

    Raises:
        UserError: neither has one that can be loaded.
    """
    try:
        return FoundTokenizer(tokenizer=_load(path, trust_remote_code), source=path, title=path)
    except _CannotLoad as error:
        # Whoever names a folder wants that tokenizer or none.
        found = None
        if stand_in is not None and not _names_a_place(path, error):
            found = _stand_in(stand_in, path, error, trust_remote_code)
        if found is None:
            raise UserError(f"No tokenizer can be loaded from {path} ({error}); {error.fix}.") from error
        return found


def _names_a_place(path: str, error: BaseException) -> bool:
    """Return whether a folder was meant: one that is there, or a path that no hub name looks like."""
    return Path(path).is_dir() or any(isinstance(cause, HFValidationError) for cause in _causes(error))


def _stand_in(folder: str, wanted: str, reason: _CannotLoad, trust_remote_code: bool) -> FoundTokenizer | None:
    try:
        tokenizer = _load(folder, trust_remote_code)
    except _CannotLoad:
        return None
    return FoundTokenizer(tokenizer=tokenizer, source=folder, title=f"{folder}, in place of {wanted}: {reason}")


def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # here, because it takes a second

    unreachable = None if Path(path).is_dir() else why_unreachable(path, "model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=unreachable is not None
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and its own
        raise (_explained(Path(path)) or _CannotLoad(unreachable or hub_reason(error))) from error
    return tokenizer


def _explained(folder: Path) -> _CannotLoad | None:
    """Return what a folder's own files say of why it has no tokenizer: transformers names the wrong library."""
    if not folder.is_dir():
        return None
    if not any((folder / name).is_file() for name in _FILES) and not any(folder.glob("*.tiktoken")):
        return _CannotLoad("it holds none")
    pointer = next((name for name in _FILES if is_lfs_pointer(folder / name)), None)
    if pointer is not None:
        return _CannotLoad(
            f"its {pointer} is a pointer of Git LFS in place of the file", "fetch that with 'git lfs pull'"
        )
    for file in (folder / name for name in _SENTENCEPIECE):
        if file.is_file() and find_spec(library := _library_of(file)) is None:
            reason = f"{library}, which reads its {file.name}, isn't installed"
            return _CannotLoad(reason, f"install it (pip install {library}), or {_NAME_ANOTHER}")
    return None


def _library_of(file: Path) -> str:
    with file.open("rb") as opened:
        return "tiktoken" if _TIKTOKEN.match(opened.readline(1000)) else "sentencepiece"


def hub_reason(error: BaseException) -> str:
    """Return in words why a model of the hub can't be loaded."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (variable := _cache_of(cause.filename)) is not None:
            return f"{cause.filename} can't be written, {cause.strerror}; set {variable} to a folder that can be"
        if isinstance(cause, HFValidationError):
            return "there is no such folder, and it is not a hub name"
        if isinstance(cause, GatedRepoError):
            return "its terms must be accepted on the Hugging Face hub; do that, then log in with 'hf auth login'"
        if isinstance(cause, RepositoryNotFoundError):
            return "the Hugging Face hub has no such model, or it is private; if so, log in with 'hf auth login'"
    return with_class_name(error)


def _cache_of(file: object) -> str | None:
    """Return the variable that moves the libraries' cache, where ``file`` lies in that or above it."""
    if not isinstance(file, str | os.PathLike):
        return None
    path = Path(file).absolute()
    places = {
        "HF_HOME": constants.HF_HOME,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_DATASETS_CACHE": os.environ.get("HF_DATASETS_CACHE", constants.HF_HOME),
    }
    caches = {variable: Path(place).absolute() for variable, place in places.items()}
    return next((name for name, each in caches.items() if path.is_relative_to(each) or each.is_relative_to(path)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

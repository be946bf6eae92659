"""Text that a model wrote, on disk: one JSON line a window, tokens for the program and words for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stages.atomic import whole_file
from stages.errors import UserError
from stages.observe.script import ScriptKind


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenWindow:
    """A line of the file."""

    window: int
    """Its number, which decides about its script and random numbers."""
    kind: ScriptKind
    text: str
    tokens: tuple[int, ...]


_WINDOWS = TypeAdapter(WrittenWindow)


@dataclass(frozen=True, slots=True)
class OwnTextFile:
    """Grows by whole batches; need not exist."""

    path: Path

    def read(self) -> tuple[WrittenWindow, ...]:
        """All that is kept.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.is_file():
            return ()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            return tuple(_WINDOWS.validate_json(line) for line in lines)
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path} can't be read as the model's own text ({reason}); delete it.") from error

    def add(self, windows: Sequence[WrittenWindow]) -> None:
        """Keep these windows too: all of them or, where that fails, none.

        Raises:
            UserError: there is no room, or no right to write.
        """
        lines = [_WINDOWS.dump_json(window) for window in (*self.read(), *windows)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise UserError(
                f"The model's own text can't be kept in {self.path.parent} ({error.strerror or error}); free space "
                "there, or choose another place with --cache_dir."
            ) from error

"""Text that a model wrote, on disk: one JSON line a window, tokens for the program and words for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from stages.json_file import explained, write_whole
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
        with explained(f"{self.path} can't be read as the model's own text", "delete it"):
            # Bytes end lines at line feeds only; text also at characters that the model may have written.
            return tuple(_WINDOWS.validate_json(line) for line in self.path.read_bytes().splitlines())

    def add(self, windows: Sequence[WrittenWindow]) -> None:
        """Keep these windows too: all of them or, where that fails, none.

        Raises:
            UserError: there is no room, or no right to write.
        """
        lines = [_WINDOWS.dump_json(window) for window in (*self.read(), *windows)]
        failure = f"The model's own text can't be kept in {self.path.parent}"
        with explained(failure, "free space there, or choose another place with --cache_dir"):
            write_whole(self.path, b"".join(line + b"\n" for line in lines))

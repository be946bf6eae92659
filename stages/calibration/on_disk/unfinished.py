"""Keep what a calibration has finished beside its cache, so that the next run goes on where one was stopped.

The folder ``.NAME.unfinished`` holds sums over the windows that were run, what enters the model's layers, gradients,
and state.json, which says how far the run came. That is written last, so it never names what isn't there whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import UserError, in_one_line
from stages.system.atomic import flush, partial_folder
from stages.system.distributed import Processes
from stages.system.json_file import read_json, write_json

_STATE = "state.json"
_COST = 20.0
"""Saving takes at most one part in so many of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """How far a run came."""

    partitions: int = 0
    """Partitions of the graph that are done."""
    batches: dict[str, int] = field(default_factory=dict)
    """Batches of the next one that are, by part of the text."""
    streams: bool = False
    """Whether what enters every link of the chain is there."""
    links: int = 0
    """Links that were run back, from the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """state.json: which calibration it is, how the graph is cut for it, and how far it came."""

    options: str
    """A digest of all that decides about its numbers."""
    providers: tuple[str, ...]
    cut: str
    """A digest of the partitions' outputs."""
    memory: int
    """Bytes that a partition might take when the graph was cut."""
    processes: int
    """Of the run that cut it."""
    reached: Reached = field(default_factory=Reached)


_STATES = TypeAdapter(State)


class Unfinished:
    """What is finished of the calibration whose cache will lie at a path.

    Args:
        path: of the cache.
        processes: those that share the run; the first one decides and writes state.json.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        self.folder = path.absolute().with_name(f".{path.name}.unfinished")
        self._path, self._processes = path, processes
        self._state: State | None = None
        self._is_kept, self._cache = False, 0
        self._unsafe: list[Path] = []
        self._saved_at, self._cost = time.monotonic(), 0.0

    @property
    def reached(self) -> Reached:
        """Return how far the calibration has come."""
        return Reached() if self._state is None else self._state.reached

    def found(self) -> State | None:
        """Return what an earlier run has left; None where there is nothing."""
        begun = partial_folder(self._path)
        return self._processes.decided_by_first(
            lambda: read_json(self.folder / _STATE, _STATES) if begun.is_dir() else None
        )

    @contextmanager
    def going_on(self, state: State, found: State | None, cache: int) -> Iterator[bool]:
        """Go on where an earlier run was stopped, or begin anew.

        What is finished is kept where the block fails, and removed where it ends well.

        Args:
            state: this calibration, of which nothing is done yet.
            found: what ``found`` has returned.
            cache: bytes that the whole calibration takes on the disk; sums are kept only where these stay free.

        Yields:
            Whether something of it was there.
        """
        # The same cut may come from another limit.
        is_same = found is not None and state == replace(
            found, reached=Reached(), memory=state.memory, processes=state.processes
        )
        self._state, self._is_kept, self._cache = found if is_same else state, is_same, cache
        if not is_same:
            self.discard()
        try:
            yield is_same
        except BaseException:
            if not self._is_kept:
                self.discard()
            raise
        self.discard()

    def discard(self) -> None:
        """Remove everything, in the first process."""
        if self._processes.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(partial_folder(self._path), ignore_errors=True)

    def bytes(self) -> int:
        """Return the bytes that an earlier run has left, which are used or removed."""
        folders = (self.folder, partial_folder(self._path))
        return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())

    def is_due(self, seconds: float) -> bool:
        """Return, in all processes alike, whether ``seconds`` have passed since the last time that something was saved.

        Where saving takes long, it is due more rarely.
        """
        wait = max(seconds, _COST * self._cost)
        return self._processes.decided_by_first(lambda: time.monotonic() - self._saved_at >= wait)

    def note(self, reached: Reached, files: Iterable[Path]) -> None:
        """Remember how far the run has come, for the next ``save``, and which files this process has written for it."""
        if self._state is not None:
            self._state = replace(self._state, reached=reached)
        self._unsafe += files

    def save(self, sums: Mapping[str, Callable[[], Mapping[str, Tensor]]]) -> None:
        """Keep how far the run has come; all processes must come here together.

        Sums are left out, and the run isn't kept, where the disk has too little room.

        Args:
            sums: this process's, by name: of the batches of a partition that isn't done. Those of earlier places are
                removed.

        Raises:
            UserError: the disk is full.
        """
        assert self._state is not None, "it has begun"
        began, place = time.monotonic(), self._sums
        if self.reached.batches and not self._processes.decided_by_first(self._has_room):
            self._saved_at = began
            return
        try:
            self.folder.mkdir(exist_ok=True)
            if sums:
                place.mkdir(exist_ok=True)
            for name, tensors_of in sums.items():
                save_file(dict(tensors_of()), place / name)
            for file in dict.fromkeys((*self._unsafe, *(place / name for name in sums))):
                flush(file)
            self._unsafe.clear()
            self._processes.barrier()
            if self._processes.is_first:
                write_json(self.folder / _STATE, _STATES, self._state)
                for other in self.folder.glob("sums-*"):
                    if other != place:
                        shutil.rmtree(other, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"What is finished of the calibration can't be kept in {self.folder.parent} ({in_one_line(error)}); "
                "free space there, or choose another --cache_dir."
            ) from error
        self._is_kept, self._saved_at = True, time.monotonic()
        self._cost = self._saved_at - began

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the sums that were saved under ``name``; nothing where there are none.

        Raises:
            UserError: they are damaged.
        """
        file = self._sums / name
        if not file.is_file():
            return {}
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}, which a calibration that was stopped has left, is damaged ({in_one_line(error)}); delete "
                f"{self.folder}, and run the same command again."
            ) from error

    def _has_room(self) -> bool:
        """Return whether there is room for sums, which take less than the cache, and for that."""
        return shutil.disk_usage(self.folder.parent).free >= 2 * self._cache

    @property
    def _sums(self) -> Path:
        reached = self.reached
        return self.folder / f"sums-{reached.partitions}-{sum(reached.batches.values())}"

"""How far the work is: bars on a terminal, and a line in the log now and then, so that files and pipes see it too.

A task counts steps that people know (groups, windows). Where steps differ in length, ``total`` is their cost, from
which the part that is done and the time left follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

_LONGEST_SILENCE = 10.0
"""Seconds after which a line is written at the next sign of life, however little was done."""
_SHORTEST_SILENCE = 1.0
_PART = 0.1
"""Part of the work after which a line is written too."""
_BAR_WIDTH = 24
_SHOWN_ON: ContextVar[Console | None] = ContextVar("console of the progress bars", default=None)
"""Handing the console from each command down to its loops would thread it through thirty functions."""


@dataclass(slots=True, kw_only=True)
class _Steps:
    """What people are told of a task besides its bar."""

    unit: str
    of: int | None
    """Steps in all where the total is their cost; None where the total says it."""
    began_with: int
    """Steps that an earlier run did."""
    done: int
    now: str = ""
    note: str = ""
    told_at: float
    told_part: float = 0.0
    ended: bool = False


class Progress:
    """Tasks on one console, from ``with`` to its end."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = _BarsAndDetails(
            TextColumn("{task.description}"),
            BarColumn(_BAR_WIDTH),
            _CountColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
            get_time=clock,
        )
        self._clock = clock

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def add_task(
        self,
        description: str,
        *,
        total: int | float | None,
        unit: str = "",
        steps: int | None = None,
        done: int = 0,
    ) -> TaskID:
        """Begin a task of ``total``, None where that isn't known yet.

        Args:
            description: what is done, the stage's name.
            total: steps, or their cost.
            unit: what a step is called, in the plural.
            steps: how many steps there are where the total is their cost.
            done: steps that an earlier run did, where the total is that of steps.
        """
        told = _Steps(unit=unit, of=steps, began_with=done, done=done, told_at=self._clock())
        task = self._bars.add_task(description, total=total, completed=done, told=told)
        if total:
            self._tell(self._task(task))
        return task

    def advance(
        self, task: TaskID, amount: int | float = 1, *, now: str | None = None, note: str | None = None
    ) -> None:
        """One more step is done, where the total is a cost, or ``amount`` of them.

        ``now`` and ``note`` are what is worked on and what came out so far, None where they stay.
        """
        told = _told(self._task(task))
        told.done += int(amount) if told.of is None else 1
        self._bars.advance(task, amount)
        self.update(task, now=now, note=note)

    def update(
        self,
        task: TaskID,
        *,
        description: str | None = None,
        total: int | float | None = None,
        now: str | None = None,
        note: str | None = None,
    ) -> None:
        """Say something new of a task; what is None stays."""
        state = self._task(task)
        told = _told(state)
        told.now = told.now if now is None else now
        told.note = told.note if note is None else note
        self._bars.update(task, description=description, total=total)
        if self._is_due(state):
            self._tell(state)

    def track(self, items: Sequence[T], *, description: str, unit: str = "") -> Iterator[T]:
        """Give out ``items`` one by one; each is a step."""
        task = self.add_task(description, total=len(items), unit=unit)
        for item in items:
            yield item
            self.advance(task)

    def remove_task(self, task: TaskID) -> None:
        """Take a bar away."""
        self._bars.remove_task(task)

    def _task(self, task: TaskID) -> Task:
        return next(state for state in self._bars.tasks if state.id == task)

    def _is_due(self, task: Task) -> bool:
        told = _told(task)
        if told.ended or task.total is None:
            return False
        if task.finished:
            return True
        silence = self._clock() - told.told_at
        return silence >= _LONGEST_SILENCE or (
            silence >= _SHORTEST_SILENCE and _part(task) - told.told_part >= _PART - 1e-9
        )

    def _tell(self, task: Task) -> None:
        told = _told(task)
        told.told_at, told.told_part, told.ended = self._clock(), _part(task), task.finished
        _LOGGER.info("%s", _line(task))


class _BarsAndDetails(Bars):
    """Below the bars stands what is worked on and what came out so far."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and one line for each task that has more to say."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if (details := _details(task)) and not task.finished:
                yield Text(f"  {details}", no_wrap=True, overflow="ellipsis")


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return Text(_count(task), style="progress.download")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return Text(_rate(task), style="progress.data.speed")


def _told(task: Task) -> _Steps:
    told: _Steps = task.fields["told"]
    return told


def _part(task: Task) -> float:
    """Part of the work that is done, 0 to 1."""
    return task.completed / task.total if task.total else 0.0


def _count(task: Task) -> str:
    """12 of 121 groups"""
    told = _told(task)
    of = task.total if told.of is None else told.of
    return " ".join(filter(None, (f"{told.done}" if of is None else f"{told.done} of {of:.0f}", told.unit)))


def _rate(task: Task) -> str:
    """0.42 groups/s, or 3.1 s each where that is easier to read."""
    told, seconds = _told(task), task.elapsed
    steps = told.done - told.began_with
    if not steps or not seconds:
        return ""
    return f"{steps / seconds:.1f}/s" if steps > seconds else f"{seconds / steps:.1f} s each"


def _details(task: Task) -> str:
    told = _told(task)
    return ", ".join(filter(None, (told.now, told.note)))


def _line(task: Task) -> str:
    if task.finished:
        return ", ".join(
            filter(None, (f"{task.description}: {_count(task)} in {_seconds(task.elapsed or 0.0)}", _told(task).note))
        )
    left = task.time_remaining
    parts = (
        f"{_count(task)} ({_part(task):.0%})",
        _rate(task),
        f"{_seconds(float(left))} left" if left and _told(task).done else "",
        _details(task),
    )
    return f"{task.description}: {', '.join(filter(None, parts))}"


def _seconds(seconds: float) -> str:
    """0.4 s, 12 s, 0:03:10"""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_on(console: Console) -> Iterator[None]:
    """Draw the progress of everything inside the block on ``console``; elsewhere nothing is drawn."""
    before = _SHOWN_ON.set(console)
    try:
        yield
    finally:
        _SHOWN_ON.reset(before)


def progress_bar() -> Progress:
    """Return the progress of tasks, drawn where ``progress_on`` says."""
    return Progress(_console())


def status(doing: str) -> AbstractContextManager[object]:
    """Say what is being done while a block without steps runs, where ``progress_on`` says."""
    return _console().status(doing)


def _console() -> Console:
    return _SHOWN_ON.get() or Console(quiet=True)

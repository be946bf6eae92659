"""Progress of long work: bars on a terminal, and now and then a line in the log, so that files and pipes show it too.

A task counts steps that people know (groups, windows). Where steps differ in length, the task's ``total`` is their
cost, which gives the finished part and the time left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress as Bars
from rich.progress import Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stages.records.quantities import duration

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

_LONGEST_SILENCE = 10.0
"""Seconds after which the next update writes a line, however little was done."""
_SHORTEST_SILENCE = 1.0
"""Seconds in which no further line is written."""
_PART = 0.1
"""Part of the work, 0 to 1, after which an update writes a line too."""
_BAR_WIDTH, _LEAST_BAR = 24, 8
_GAP = 1
_SHOWN_ON: ContextVar[Console | None] = ContextVar("console of the progress bars", default=None)
"""As a parameter, the console would pass from each command through thirty functions to its loops."""


@dataclass(slots=True, kw_only=True)
class _State:
    """State of a task besides its bar, and when it was last logged."""

    unit: str
    total_steps: int | None
    """Number of steps where the total is their cost; None where the total is their number."""
    done_before: int
    """Steps that an earlier run finished."""
    keeps: str
    """What a run that is stopped keeps, in the plural; empty where it keeps nothing."""
    done: int
    now: str = ""
    note: str = ""
    logged_at: float
    logged_part: float = 0.0
    ended: bool = False


class Progress:
    """Tasks whose bars are drawn on one console while a ``with`` block runs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = _BarsAndDetails(
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
        if isinstance(error, KeyboardInterrupt) and (running := [task for task in self._bars.tasks if task.remaining]):
            kept = [task for task in running if _state(task).keeps]
            error.add_note(_stopped((kept or running)[0]))

    def add_task(
        self,
        description: str,
        *,
        total: int | float | None,
        unit: str = "",
        steps: int | None = None,
        done: int = 0,
        keeps: str = "",
    ) -> TaskID:
        """Begin a task of ``total``, which is None where it isn't known yet.

        Args:
            description: the name of the work.
            total: the number of steps, or their cost.
            unit: what steps are called, in the plural.
            steps: the number of steps where the total is the cost of those that aren't done yet.
            done: steps that an earlier run finished.
            keeps: what a run that is stopped keeps, in the plural.
        """
        state = _State(
            unit=unit,
            total_steps=steps,
            done_before=done,
            keeps=keeps,
            done=done,
            logged_at=self._clock(),
        )
        task = self._bars.add_task(description, total=total, completed=done if steps is None else 0, state=state)
        if total:
            self._log(self._task(task))
        return task

    def advance(
        self, task: TaskID, amount: int | float = 1, *, now: str | None = None, note: str | None = None
    ) -> None:
        """Count ``amount`` steps as done; where the total is a cost, one step of cost ``amount``.

        Args:
            task: what ``add_task`` returned.
            amount: steps, or the cost of one.
            now: what is worked on; None: as before.
            note: the result so far; None: as before.
        """
        state = _state(self._task(task))
        state.done += int(amount) if state.total_steps is None else 1
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
        """Change what is shown of a task, where an argument isn't None; see ``add_task`` and ``advance``."""
        bar = self._task(task)
        state = _state(bar)
        state.now = state.now if now is None else now
        state.note = state.note if note is None else note
        self._bars.update(task, description=description, total=total)
        if self._is_due(bar):
            self._log(bar)

    def track(self, items: Sequence[T], *, description: str, unit: str = "", keeps: str = "") -> Iterator[T]:
        """Yield ``items`` one by one; each is a step. ``add_task`` explains the rest."""
        task = self.add_task(description, total=len(items), unit=unit, keeps=keeps)
        for item in items:
            yield item
            self.advance(task)

    def remove_task(self, task: TaskID) -> None:
        """Remove the bar of ``task``."""
        self._bars.remove_task(task)

    def _task(self, task: TaskID) -> Task:
        return next(bar for bar in self._bars.tasks if bar.id == task)

    def _is_due(self, task: Task) -> bool:
        state = _state(task)
        if state.ended or task.total is None:
            return False
        if task.finished:
            return True
        silence = self._clock() - state.logged_at
        return silence >= _LONGEST_SILENCE or (
            silence >= _SHORTEST_SILENCE and _part(task) - state.logged_part >= _PART - 1e-9
        )

    def _log(self, task: Task) -> None:
        state = _state(task)
        state.logged_at, state.logged_part, state.ended = self._clock(), _part(task), task.finished
        _LOGGER.info("%s", _line(task))


@contextmanager
def progress_on(console: Console) -> Iterator[None]:
    """Draw the progress of everything inside the block on ``console``; without it, on standard error.

    Only terminals get bars; ``Console(quiet=True)`` gets none either.
    """
    before = _SHOWN_ON.set(console)
    try:
        yield
    finally:
        _SHOWN_ON.reset(before)


def progress_bar() -> Progress:
    """Return progress bars, drawn where ``progress_on`` says."""
    return Progress(_console())


def status(doing: str) -> AbstractContextManager[object]:
    """Show what is being done while a block without steps runs, where ``progress_on`` says."""
    _LOGGER.info("%s ...", doing)
    return _console().status(doing)


def _console() -> Console:
    return _SHOWN_ON.get() or Console(stderr=True)


class _BarsAndDetails(Bars):
    """Bars with what is worked on, and the results so far, below them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, and one line for each task that has details."""
        yield _BarLines(tuple(task for task in self.tasks if task.total != 0))
        for task in self.tasks:
            if (details := _details(task)) and not task.finished:
                yield Text(f"  {details}", no_wrap=True, overflow="ellipsis")


@dataclass(frozen=True, slots=True)
class _BarLines:
    """One line a task, never wider than the terminal: where room is short the rate goes, then the bar."""

    tasks: tuple[Task, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the lines for the console's width."""
        rows = [(task.description, _count(task), _rate(task), _times(task)) for task in self.tasks]
        widths = [max((cell_len(row[index]) for row in rows), default=0) for index in range(4)]
        room = options.max_width - sum(widths) - 4 * _GAP
        if room < _LEAST_BAR:
            room += widths[2] + _GAP
            rows, widths[2] = [(name, count, "", times) for name, count, _, times in rows], 0
        bar = min(room, _BAR_WIDTH) if room >= _LEAST_BAR else 0
        table = Table.grid(padding=(0, _GAP, 0, 0))
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(widths[0] + min(room + _GAP, 0), 1))
        for width in (bar, *widths[1:]):
            if width:
                table.add_column(no_wrap=True, min_width=width)
        for task, (name, count, rate, times) in zip(self.tasks, rows, strict=True):
            drawn = [ProgressBar(total=task.total, completed=task.completed, width=bar, pulse=not task.started)] * bool(
                bar
            )
            texts = [Text(count, style="progress.download")]
            texts += [Text(rate, style="progress.data.speed")] * bool(widths[2])
            table.add_row(Text(name), *drawn, *texts, Text(times, style="progress.elapsed"))
        yield table


def _state(task: Task) -> _State:
    state: _State = task.fields["state"]
    return state


def _part(task: Task) -> float:
    """Return the finished part of the work, 0 to 1."""
    return task.completed / task.total if task.total else 0.0


def _count(task: Task) -> str:
    """Return the steps so far: 12 of 121 groups."""
    state = _state(task)
    total = task.total if state.total_steps is None else state.total_steps
    return " ".join(filter(None, (f"{state.done}" if total is None else f"{state.done} of {total:.0f}", state.unit)))


def _rate(task: Task) -> str:
    """Return the speed, 2.4/s, or 3.1 s each where that is easier to read."""
    state, seconds = _state(task), _elapsed(task)
    steps = state.done - state.done_before
    if not steps or not seconds:
        return ""
    return f"{steps / seconds:.1f}/s" if steps > seconds else f"{duration(seconds / steps)} each"


def _elapsed(task: Task) -> float:
    """Return the seconds that a task has taken; those of a finished one stand still."""
    return float(task.finished_time or task.elapsed or 0.0)


def _times(task: Task) -> str:
    """Return how long a task took, or has taken and will take: 12 s, 1 min 3 s left."""
    if task.finished:
        return f"in {duration(_elapsed(task))}"
    return ", ".join(filter(None, (duration(_elapsed(task)), _left(task))))


def _left(task: Task) -> str:
    """Return the time left, which is an estimate in whole seconds; nothing where there is none."""
    left = task.time_remaining
    if not left or not _state(task).done:
        return ""
    return f"{left:.0f} s left" if left < 60 else f"{duration(float(left))} left"


def _details(task: Task) -> str:
    state = _state(task)
    return ", ".join(filter(None, (state.now, state.note)))


def _stopped(task: Task) -> str:
    """Say how far a task came that Ctrl-C stopped, and what is kept of it."""
    kept = _state(task).keeps
    outcome = (
        f"; finished {kept} are kept, run the same command again to continue."
        if kept
        else ", which are not kept; the same command begins this step anew."
    )
    return f"stopped at {task.description}: {_count(task)}{outcome}"


def _line(task: Task) -> str:
    if task.finished:
        return ", ".join(
            filter(None, (f"{task.description}: {_count(task)} in {duration(_elapsed(task))}", _state(task).note))
        )
    # Percents of a cost beside a count of steps would contradict it.
    percent = f" ({_part(task):.0%})" if _state(task).total_steps is None else ""
    parts = (
        f"{_count(task)}{percent}",
        _rate(task),
        _left(task),
        _details(task),
    )
    return f"{task.description}: {', '.join(filter(None, parts))}"

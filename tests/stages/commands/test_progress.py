"""Progress as lines: something at the beginning and the end, between them at every tenth or after ten seconds."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from stages.commands.progress import Progress, progress_bar, progress_on, status


class Clock:
    """Goes on when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="stages.commands.progress")
    return caplog


def quiet(clock: Clock) -> Progress:
    return Progress(Console(quiet=True), clock)


def test_fast_work_says_that_it_began_and_that_it_ended(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("search", total=100, unit="groups")
        for _ in range(100):
            clock.now += 0.004
            progress.advance(task)
    assert lines.messages == ["search: 0 of 100 groups (0%)", "search: 100 of 100 groups in 0.4 s"]


def test_slow_work_says_every_tenth_how_fast_it_is_and_what_is_left(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("search", total=100, unit="groups")
        for number in range(1, 101):
            clock.now += 0.5
            progress.advance(task, now=f"group {number}", note="error 1%")
    assert len(lines.messages) == 11
    assert lines.messages[1] == "search: 10 of 100 groups (10%), 2.0/s, 45 s left, group 10, error 1%"
    assert lines.messages[-1] == "search: 100 of 100 groups in 50 s, error 1%"


def test_very_slow_work_breaks_its_silence_at_the_next_sign_of_life(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("search", total=1000, unit="groups")
        for seconds in (3, 3, 3, 3, 90):
            clock.now += seconds
            progress.advance(task)
    assert [message.split(",")[0] for message in lines.messages] == [
        "search: 0 of 1000 groups (0%)",
        "search: 4 of 1000 groups (0%)",
        "search: 5 of 1000 groups (0%)",
    ]
    assert "20 s each" in lines.messages[-1]


@pytest.mark.parametrize(
    ("keeps", "words"),
    [
        ("groups", "stopped at search: 4 of 5 groups; finished groups are kept, run the same command again to "),
        ("", "stopped at search: 4 of 5 groups, which are not kept; the same command begins this step anew."),
    ],
)
def test_work_that_is_stopped_says_what_is_kept(keeps: str, words: str, clock: Clock) -> None:
    def search() -> None:
        with quiet(clock) as progress:
            task = progress.add_task("search", total=10.0, steps=5, unit="groups", done=3, keeps=keeps)
            progress.advance(task, 2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        search()
    assert stop.value.__notes__[0].startswith(words)


def test_time_left_follows_the_cost_of_what_is_left_not_its_number(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("search", total=100.0, steps=3, unit="groups")
        progress.advance(task, 0.0)
        for cost in (20.0, 80.0):
            clock.now += cost
            progress.advance(task, cost)
    halfway, end = lines.messages[-2:]
    assert halfway == "search: 2 of 3 groups, 10 s each, 1 min 20 s left"
    assert end == "search: 3 of 3 groups in 1 min 40 s"


def test_what_an_earlier_run_did_counts_as_done_but_not_for_the_rate(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("tuning", total=100, unit="steps", done=80)
        for _ in range(5):
            clock.now += 4
            progress.advance(task)
    assert lines.messages[0] == "tuning: 80 of 100 steps (80%)"
    assert lines.messages[-1].startswith("tuning: 83 of 100 steps (83%), 4.0 s each, 1 min ")


def test_a_total_that_comes_later_and_items_that_are_handed_out(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with quiet(clock) as progress:
        task = progress.add_task("writing", total=None, unit="tensors")
        assert lines.messages == []
        for _ in range(3):
            progress.update(task, total=3)
            progress.advance(task)
        assert lines.messages == ["writing: 3 of 3 tensors in 0.0 s"]
        assert list(progress.track(["a", "b"], description="checking", unit="sites")) == ["a", "b"]
        assert lines.messages[1:] == ["checking: 0 of 2 sites (0%)", "checking: 2 of 2 sites in 0.0 s"]
        assert list(progress.track([], description="nothing")) == []


def test_a_terminal_gets_bars_with_what_is_worked_on_below(clock: Clock) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with Progress(console, clock) as progress:
        task = progress.add_task("search", total=4, unit="groups")
        clock.now += 2
        progress.advance(task, now="layers.0/mlp/up_proj", note="error 1%")
        other = progress.add_task("gone", total=2)
        progress.remove_task(other)
        progress._bars.refresh()
    shown = screen.getvalue()
    for part in ("━", "1 of 4 groups", "2.0 s each", "layers.0/mlp/up_proj, error 1%", "\x1b["):
        assert part in shown


def drawn(progress: Progress, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(*progress._bars.get_renderables())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_stay_in_one_line_and_keep_their_counts(width: int, clock: Clock) -> None:
    with quiet(clock) as progress:
        for name in ("Phi-3.5-MoE-instruct", "checking products"):
            task = progress.add_task(name, total=12345, unit="groups")
            for _ in range(6):
                clock.now += 10
                progress.advance(task, 113)
        lines = drawn(progress, width)
    assert len(lines) == 2
    assert all(len(line) <= width and "678 of 12345 groups" in line for line in lines)
    assert any(mark in lines[0] for mark in "━╸") == (width > 60)
    assert re.search(r"\d min 0 s, \d+ min \d+ s left$", lines[1].rstrip())


def test_the_bar_of_finished_work_stops_counting(clock: Clock) -> None:
    with quiet(clock) as progress:
        progress.add_task("forecast", total=0, unit="groups")
        task = progress.add_task("search", total=4, unit="groups")
        clock.now += 8
        progress.advance(task, 4)
        before = drawn(progress, 80)
        clock.now += 100
        assert drawn(progress, 80) == before
        assert before[0].endswith("4 of 4 groups 2.0 s each in 8.0 s")


def test_status_is_a_line_where_there_is_no_terminal(lines: pytest.LogCaptureFixture) -> None:
    with progress_on(Console(file=io.StringIO())), status("reading the models"):
        assert lines.messages == ["reading the models ..."]


def test_bars_are_drawn_on_standard_error_unless_a_console_is_named() -> None:
    assert progress_bar()._bars.console.stderr
    quiet_console = Console(quiet=True)
    with progress_on(quiet_console):
        assert progress_bar()._bars.console is quiet_console


@pytest.mark.parametrize("console", [Console(file=io.StringIO()), Console(quiet=True, force_terminal=True)])
def test_files_and_quiet_consoles_get_no_bars(console: Console, clock: Clock) -> None:
    with Progress(console, clock) as progress:
        progress.advance(progress.add_task("search", total=1))
    if isinstance(console.file, io.StringIO):
        assert console.file.getvalue() == ""

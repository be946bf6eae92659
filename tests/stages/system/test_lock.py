"""One run writes to a place; the others hear at once who does, and a run that was killed locks nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import filelock
import pytest

from stages.errors import UserError
from stages.system.lock import exclusive

_HOLD = """
import sys, time
from pathlib import Path
from stages.system.lock import exclusive
with exclusive(Path(sys.argv[1]), option="--x"):
    print("held", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_hears_who_holds_the_place_and_leaves_it_alone(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    said = rf"^--y {place} is being written by process {os.getpid()} on {socket.gethostname()}; wait until"
    with exclusive(place, option="--x"):
        with pytest.raises(UserError, match=said), exclusive(place, option="--y"):
            pass
        with pytest.raises(UserError, match=said), exclusive(place, option="--y"):
            pass
        assert names(tmp_path / "deep") == [".out.lock"]
    with exclusive(place, option="--y"):
        assert not place.exists()
    assert names(tmp_path) == []


def test_links_to_a_place_mean_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with (
        exclusive(tmp_path / "real", option="--x"),
        pytest.raises(UserError, match="is being written by"),
        exclusive(tmp_path / "link", option="--y"),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"written by process {other.pid} on"),
            exclusive(tmp_path / "out", option="--y"),
        ):
            pass
        os.kill(other.pid, signal.SIGKILL)
    assert names(tmp_path) == [".out.lock"]
    with exclusive(tmp_path / "out", option="--y"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["\n7 another-host\n" * 9, "", "\0" * 99, "7"])
def test_a_file_that_was_left_is_no_lock(tmp_path: Path, content: str) -> None:
    (tmp_path / ".out.lock").write_text(content)
    with exclusive(tmp_path / "out", option="--x"):
        held = (tmp_path / ".out.lock").read_text()
    assert held == f"\n{os.getpid()} {socket.gethostname()}\n"
    assert names(tmp_path) == []


def test_a_holder_that_has_not_signed_is_another_run(tmp_path: Path) -> None:
    with (
        filelock.FileLock(tmp_path / ".out.lock"),
        pytest.raises(UserError, match="is being written by another run; wait"),
        exclusive(tmp_path / "out", option="--x"),
    ):
        pass


def test_processes_of_one_run_do_not_lock_each_other_out(tmp_path: Path) -> None:
    with exclusive(tmp_path / "out", option="--x"), exclusive(tmp_path / "out", option="--x", owner=False):
        assert names(tmp_path) == [".out.lock"]


def test_a_run_may_wait_for_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, ended = Event(), list[str]()

    def hold() -> None:
        with exclusive(tmp_path / "out", option="--x"):
            held.set()
            time.sleep(0.5)
            ended.append("first")

    first = Thread(target=hold)
    first.start()
    held.wait()
    with caplog.at_level("INFO"), exclusive(tmp_path / "out", option="--x", waits=True):
        assert ended == ["first"]
    first.join()
    assert f"waiting for process {os.getpid()} on" in caplog.text
    assert names(tmp_path) == []


def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", refuse)
    with exclusive(tmp_path / "out", option="--x"):
        assert "is on a disk without locks" in caplog.text
    assert names(tmp_path) == []


def test_a_place_that_can_t_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--x .*deeper can't be written \(.*\); choose one"):
        exclusive(tmp_path / "file" / "deeper", option="--x").__enter__()
    with pytest.raises(UserError, match=r"--x .* can't be written \(File name too long\)"):
        exclusive(tmp_path / "new" / ("n" * 300), option="--x").__enter__()
    assert names(tmp_path) == ["file"]

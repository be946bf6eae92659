"""Wait for files that appear late, or never."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Timer

import pytest

from stages.errors import UserError
from stages.system import shared_folder
from stages.system.shared_folder import wait_for, wait_until


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    wait_for([tmp_path], patience=0.0)


def test_a_file_that_appears_late_is_waited_for_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_folder, "_SAID_AFTER", 0.05)
    late = tmp_path / "late"
    timer = Timer(0.3, late.touch)
    timer.start()
    with caplog.at_level(logging.INFO):
        wait_for([tmp_path, late], patience=30.0)
    timer.join()
    assert late.exists()
    assert [record.getMessage() for record in caplog.records] == [f"waiting for {late}, which another process wrote."]


def test_a_file_that_never_appears_is_one_sentence(tmp_path: Path) -> None:
    lost = tmp_path / "0001.up_proj.safetensors"
    with pytest.raises(UserError, match=r"0001\.up_proj\.safetensors was written by another process of this run"):
        wait_for([tmp_path, lost], patience=0.1)


def test_what_is_there_may_still_be_old(tmp_path: Path) -> None:
    looks = iter([False, False, True])
    wait_until(lambda: next(looks), tmp_path, patience=30.0)
    assert next(looks, None) is None

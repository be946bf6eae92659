"""Windows are shared by weight, none is lost, and mix gives up small parts before it gives up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.calibration.text.mix import MIX_PARTS, dataset_names, held_out_windows, windows_by_dataset
from stages.errors import UserError
from tests.stages.calibration.text.stories import write_stories


def test_names_are_separated_by_commas_but_in_the_name_of_a_file(tmp_path: Path) -> None:
    path = write_stories(tmp_path / "salt=1, pepper=2.txt")
    assert dataset_names("offline=2, cnn") == ("offline", "cnn")
    assert dataset_names(str(path)) == (str(path),)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("offline,", "--dataset offline, has a comma without a name beside it; remove it"),
        ("offline,cnn,offline", "--dataset names offline twice; give it more windows with offline=2"),
    ],
)
def test_names_that_are_missing_or_come_twice_are_refused(dataset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset_names(dataset)


def test_windows_are_shared_by_weight() -> None:
    assert windows_by_dataset("a,b,c", 8) == {"a": 3, "b": 3, "c": 2}
    assert windows_by_dataset("a=3,b=1", 8) == {"a": 6, "b": 2}
    assert windows_by_dataset("mix=9,a=1", 1000) == {**{part: 9 * share for part, share in MIX_PARTS.items()}, "a": 100}


def test_a_share_that_is_too_small_is_refused_with_what_is_enough() -> None:
    with pytest.raises(UserError, match=r"--calib_size 8 is too small for --dataset a=9,b=1; .* so pass 16 or more"):
        windows_by_dataset("a=9,b=1", 8)
    assert min(windows_by_dataset("a=9,b=1", 16).values()) == 2


@pytest.mark.parametrize("windows", range(2, 70))
def test_mix_leaves_out_the_parts_that_have_no_room(windows: int) -> None:
    shares = windows_by_dataset("mix", windows)
    assert sum(shares.values()) == windows
    assert min(shares.values()) >= 2
    assert list(shares) == list(MIX_PARTS)[: len(shares)]
    assert sum(held_out_windows(shares).values()) in range(1, windows)


def test_the_page_states_the_parts() -> None:
    page = (Path(__file__).parents[4] / "docs/calibration-data.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| `(\w+)`.* \| (\d+) \|$", page, re.MULTILINE)
    assert {name: int(percent) for name, percent in stated} == MIX_PARTS


def test_parts_that_can_t_be_had_leave_their_windows_to_the_others() -> None:
    shares = windows_by_dataset("mix", 110, without=("self",))
    assert shares == {part: 2 * share for part, share in MIX_PARTS.items() if part != "self"}

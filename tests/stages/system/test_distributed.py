"""Split work among processes; tests/pipelines/test_processes.py runs several."""

from __future__ import annotations

import accelerate
import pytest

from stages.errors import UserError
from stages.system.distributed import Processes, join_processes, split_by_cost


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_every_piece_of_work_is_done_once(shares: int) -> None:
    costs = [5.0, 1.0, 1.0, 8.0, 2.0, 2.0, 1.0]
    parts = split_by_cost(costs, shares)
    assert len(parts) == shares
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))


def test_shares_cost_about_the_same() -> None:
    costs = [14336.0**2 if index % 4 == 3 else 4096.0**2 for index in range(128)]
    totals = [sum(costs[index] for index in part) for part in split_by_cost(costs, 4)]
    assert max(totals) < 1.05 * sum(costs) / 4


def test_more_processes_than_work() -> None:
    assert split_by_cost([3.0], 3) == [frozenset({0}), frozenset(), frozenset()]


@pytest.mark.parametrize("size", [None, "", "1"])
def test_without_a_launcher_one_process_does_everything(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    processes = join_processes()
    assert processes == Processes(None)
    assert (processes.is_first, processes.count, processes.my_share([1.0, 2.0])) == (True, 1, {0, 1})
    with processes.main_process_first():
        processes.barrier()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("two", r"^WORLD_SIZE is 'two', which is not a number of processes; unset it\.$"),
        (
            "2",
            r"^WORLD_SIZE is 2, but the processes can't be joined \(no RANK\); start them with accelerate",
        ),
    ],
)
def test_a_launcher_s_variables_without_a_launcher_are_one_sentence(
    size: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("no RANK")

    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(accelerate, "PartialState", refuse)
    with pytest.raises(UserError, match=message):
        join_processes()

"""Processes that ``accelerate launch`` started together: who does what, who waits for whom, who tells what to whom."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState

Said = TypeVar("Said")

_LOGGER = logging.getLogger(__name__)

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: a share of a large model takes hours."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among its peers; without a launcher it is the only one and never waits."""

    state: PartialState | None

    @property
    def is_first(self) -> bool:
        return self.state is None or bool(self.state.is_main_process)

    @property
    def count(self) -> int:
        return 1 if self.state is None else int(self.state.num_processes)

    @property
    def index(self) -> int:
        """This process's place, from 0."""
        return 0 if self.state is None else int(self.state.process_index)

    @property
    def count_here(self) -> int:
        """How many of them share this machine."""
        return 1 if self.state is None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def index_here(self) -> int:
        """This process's place on its machine, from 0: the number of its GPU."""
        return 0 if self.state is None else int(self.state.local_process_index)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process runs the block while the others wait; then they run it too."""
        if self.state is None:
            yield
        else:
            with self.state.main_process_first():
                yield

    def barrier(self) -> None:
        """Return when every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def my_share(self, costs: Sequence[float]) -> frozenset[int]:
        """Indices of the pieces of work, of these ``costs``, that are this process's: the same split everywhere."""
        return split_by_cost(costs, self.count)[self.index]

    def broadcast(self, said: Said) -> Said:
        """What the first process says; what the others pass is not looked at."""
        if self.state is None:
            return said
        heard = [said]
        torch.distributed.broadcast_object_list(heard, src=0, device=self.state.device)
        return heard[0]

    def exchange(self, mine: Mapping[str, Tensor], owners: Mapping[str, int]) -> dict[str, list[Tensor]]:
        """Give every tensor to the process that owns its name; all processes must come here together.

        Args:
            mine: what this process has, by name; of any shapes and types, and not the same names everywhere.
            owners: the index of the process that each name belongs to, in the same order everywhere.

        Returns:
            For each name that this process owns, what the processes had, in their order.
        """
        if self.state is None:
            return {name: [tensor] for name, tensor in mine.items()}
        held: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(self.count)]
        torch.distributed.all_gather_object(held, {name: (value.shape, value.dtype) for name, value in mine.items()})
        found: dict[str, list[Tensor]] = {name: [] for name, owner in owners.items() if owner == self.index}
        posted: list[torch.distributed.P2POp] = []
        for tag, (name, owner) in enumerate(owners.items()):
            holders = [index for index in range(self.count) if name in held[index]]
            if owner == self.index:
                found[name] = [self._receive(mine, name, held[index][name], index, tag, posted) for index in holders]
            elif name in mine:
                value = mine[name].to(self.state.device).contiguous()
                posted.append(torch.distributed.P2POp(torch.distributed.isend, value, owner, tag=tag))
        for work in torch.distributed.batch_isend_irecv(posted) if posted else ():
            work.wait()
        return found

    def _receive(
        self,
        mine: Mapping[str, Tensor],
        name: str,
        form: tuple[torch.Size, torch.dtype],
        sender: int,
        tag: int,
        posted: list[torch.distributed.P2POp],
    ) -> Tensor:
        """What ``sender`` has of ``name``: its own tensor, or one that ``posted`` will fill."""
        if sender == self.index:
            return mine[name]
        assert self.state is not None
        shape, dtype = form
        coming = torch.empty(shape, dtype=dtype, device=self.state.device)
        posted.append(torch.distributed.P2POp(torch.distributed.irecv, coming, sender, tag=tag))
        return coming


def join_processes() -> Processes:
    """Find the other processes, where a launcher started this one (it says so in WORLD_SIZE).

    A launcher that was asked for more and started this one alone gets a warning in the log: accelerate does so on
    machines without GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
            _LOGGER.warning(
                "accelerate started one process alone; on a machine without GPUs it starts several with "
                "accelerate launch --multi_gpu --num_processes N"
            )
        return Processes(None)
    from accelerate import PartialState

    return Processes(PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE))


def split_by_cost(costs: Sequence[float], shares: int) -> list[frozenset[int]]:
    """Indices in ``shares`` parts of about the same cost: the largest first, each to the part with least so far.

    At most 4/3 of the best possible largest part (Graham 1969, SIAM J. Appl. Math. 17(2)).
    """
    totals = [0.0] * shares
    parts: list[set[int]] = [set() for _ in range(shares)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = min(range(shares), key=lambda share: (totals[share], share))
        totals[least] += costs[index]
        parts[least].add(index)
    return [frozenset(part) for part in parts]

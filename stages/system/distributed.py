"""Distributed runs: processes that ``accelerate launch`` started together share work, wait, broadcast and exchange."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from stages.errors import UserError, in_one_line

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")

_LOGGER = logging.getLogger(__name__)
_TIMEOUT = timedelta(days=7)
"""For waiting for other processes: a share of a large model takes hours."""
_PLACE_IN_SOURCE = re.compile(r"^\[[^]]*\] ")
"""Of the library's own messages."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among its peers; without a launcher it is the only one, and never waits."""

    state: PartialState | None

    @property
    def is_first(self) -> bool:
        return self.state is None or bool(self.state.is_main_process)

    @property
    def count(self) -> int:
        return 1 if self.state is None else int(self.state.num_processes)

    @property
    def index(self) -> int:
        """Return this process's place, from 0."""
        return 0 if self.state is None else int(self.state.process_index)

    @property
    def count_here(self) -> int:
        """Return how many of the processes share this machine."""
        return 1 if self.state is None else _number("LOCAL_WORLD_SIZE")

    @property
    def index_here(self) -> int:
        """Return this process's place on its machine, from 0: the number of its GPU."""
        return 0 if self.state is None else int(self.state.local_process_index)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the first process while the others wait; then in them too."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.state is not None:
            with _connected():
                self.state.wait_for_everyone()

    def my_share(self, costs: Sequence[float]) -> frozenset[int]:
        """Return the indices of the work, of these ``costs``, that is this process's; all processes split alike."""
        return split_by_cost(costs, self.count)[self.index]

    def broadcast(self, value: Value) -> Value:
        """Return the first process's ``value`` in all processes; the others' is ignored."""
        if self.state is None:
            return value
        received = [value]
        with _connected():
            torch.distributed.broadcast_object_list(received, src=0, device=self.state.device)
        return received[0]

    def decided_by_first(self, decide: Callable[[], Value]) -> Value:
        """Return what ``decide`` returns in the first process; the others don't call it.

        What depends on files that a run writes is decided once: machines see those of a shared folder at other times.
        """
        return cast("Value", self.broadcast(decide() if self.is_first else None))

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
        with _connected():
            mine_here = {name: (value.shape, value.dtype) for name, value in mine.items()}
            torch.distributed.all_gather_object(held, mine_here)
        found: dict[str, list[Tensor]] = {name: [] for name, owner in owners.items() if owner == self.index}
        posted: list[torch.distributed.P2POp] = []
        for tag, (name, owner) in enumerate(owners.items()):
            holders = [index for index in range(self.count) if name in held[index]]
            if owner == self.index:
                found[name] = [self._receive(mine, name, held[index][name], index, tag, posted) for index in holders]
            elif name in mine:
                value = mine[name].to(self.state.device).contiguous()
                posted.append(torch.distributed.P2POp(torch.distributed.isend, value, owner, tag=tag))
        with _connected():
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
        """Return ``sender``'s tensor called ``name``: the one here, or an empty one that ``posted`` will fill."""
        if sender == self.index:
            return mine[name]
        assert self.state is not None
        shape, dtype = form
        incoming = torch.empty(shape, dtype=dtype, device=self.state.device)
        posted.append(torch.distributed.P2POp(torch.distributed.irecv, incoming, sender, tag=tag))
        return incoming


def join_processes() -> Processes:
    """Join the processes that a launcher started with this one, as WORLD_SIZE says.

    Where accelerate started a single process although it was asked for several, as it does on machines without GPUs,
    the log gets a warning.

    Raises:
        UserError: WORLD_SIZE asks for several, but no launcher says where they are.
    """
    count = _number("WORLD_SIZE")
    if count <= 1:
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
            _LOGGER.warning(
                "accelerate started one process only; on a machine without GPUs it starts several with "
                "accelerate launch --multi_gpu --num_processes N"
            )
        return Processes(None)
    from accelerate import PartialState

    try:
        return Processes(PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {count}, but the processes can't be joined ({_reason(error)}); start them with "
            "accelerate launch, on every machine, or unset it."
        ) from error


@contextmanager
def _connected() -> Iterator[None]:
    """Raise UserError where the block finds that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"Another process of this launch has ended ({_reason(error)}), and its own messages say why; run the same "
            "command again on every machine: what is finished is kept."
        ) from error


def _reason(error: BaseException) -> str:
    return _PLACE_IN_SOURCE.sub("", in_one_line(error))


def _number(variable: str) -> int:
    """Return the number of processes in ``variable``; 1 where it is unset or empty."""
    value = os.environ.get(variable, "").strip() or "1"
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{variable} is '{value}', which is not a number of processes; unset it.") from error


def split_by_cost(costs: Sequence[float], shares: int) -> list[frozenset[int]]:
    """Split indices into ``shares`` parts of about equal cost: the largest first, each to the part with least so far.

    The largest part costs at most 4/3 of the best possible largest part (Graham 1969, SIAM J. Appl. Math. 17(2)).
    """
    totals = [0.0] * shares
    parts: list[set[int]] = [set() for _ in range(shares)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = min(range(shares), key=lambda share: (totals[share], share))
        totals[least] += costs[index]
        parts[least].add(index)
    return [frozenset(part) for part in parts]

"""Stage one's passes: piece after piece of the graph over all windows; what a piece observed is saved before the next.

One piece, where statistics, tapped activations and weights fit the memory; more where they don't. What crosses from
one piece to the next goes through files, so that each token passes each node once, however many pieces there are.

Processes launched together take turns with the batches, and each adds up the statistics of some activations over the
batches of all, in their order: the sums are those of one process, bit for bit, and lie in the memory of all.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import psutil
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from stages.calibration.cache import CacheWriter
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, tapped_itemsize
from stages.calibration.text.windows import TokenWindows
from stages.commands.calibrate_options import PART_OF_FREE_MEMORY
from stages.commands.parsing import parse_size
from stages.commands.progress import Progress, progress_bar
from stages.errors import UserError, in_one_line
from stages.model.directory import ModelDirectory
from stages.model.partition import Partition, cut_into_partitions
from stages.records.results import ActivationStats
from stages.records.sites import ActivationGroup
from stages.runtime.providers import ProviderChoice
from stages.runtime.tap import ActivationTap, open_piece_tap
from stages.runtime.upcast import resident_bytes
from stages.system.distributed import Processes, split_by_cost
from stages.system.hardware import one_thread_each


@dataclass(frozen=True, slots=True)
class CarriedValues:
    """The values of the batches of one run through the pieces; ``folder`` is there and its own."""

    folder: Path

    def read(self, batch: str) -> dict[str, np.ndarray]:
        """Everything that was kept for ``batch``; nothing before its first piece."""
        file = self._file(batch)
        return load_file(file) if file.is_file() else {}

    def keep(self, batch: str, values: Mapping[str, np.ndarray], needed: Collection[str]) -> None:
        """Keep those of ``values`` that are still ``needed``, in place of what was kept for ``batch``."""
        kept = {name: np.ascontiguousarray(array) for name, array in values.items() if name in needed}
        file = self._file(batch)
        file.unlink(missing_ok=True)
        if not kept:
            return
        try:
            save_file(kept, file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"What one part of the model hands to the next can't be written to {self.folder.parent.parent} "
                f"({in_one_line(error)}); free space there, choose another --cache_dir, or raise --max_memory."
            ) from error

    def _file(self, batch: str) -> Path:
        return self.folder / f"{batch}.safetensors"


_PARTS = ("held_out", "calibration")


_NAMES = {"held_out": "held-out text", "calibration": "calibration text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The windows that stage one runs on."""

    calibration_windows: int
    held_out_windows: int
    seq_len: int
    batch_size: int

    def size(self, group: ActivationGroup, part: str) -> StatisticsSize:
        """Return what the statistics of ``group`` on the windows of ``part`` take."""
        windows = self.held_out_windows if part == "held_out" else self.calibration_windows
        return StatisticsSize(
            in_features=group.in_features,
            tokens=windows * self.seq_len,
            itemsize=tapped_itemsize(group.sites[0].dtype),
        )


def memory_limit(max_memory: str | None, device: torch.device, processes: Processes) -> int:
    """Return the bytes that a piece of the graph may take in one process.

    Args:
        max_memory: the option's text, which decides where it is given; else a part of what is free is used.
        device: where statistics are added up; on CUDA its free memory counts too.
        processes: those on this machine share the free memory.

    Raises:
        OptionError: ``max_memory`` isn't a size.
    """
    if max_memory is not None:
        return parse_size(max_memory, "--max_memory")
    free = psutil.virtual_memory().available // processes.count_here
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return int(free * PART_OF_FREE_MEMORY)


def partition_bytes(groups: Iterable[ActivationGroup], text: TextShape, processes: Processes) -> dict[str, int]:
    """Return by activation the bytes that one process holds of it: its share of the statistics, and one batch."""

    def held(group: ActivationGroup) -> int:
        sizes = [text.size(group, part) for part in _PARTS]
        batch = text.batch_size * text.seq_len * group.in_features * sizes[0].itemsize
        return batch + sum(size.memory for size in sizes) // processes.count

    return {group.activation: held(group) for group in groups}


def cut_to_memory(
    model: ir.Model, costs: Mapping[str, int], memory: int, providers: tuple[str, ...]
) -> tuple[Partition, ...]:
    """Return ``model`` in pieces that fit the memory.

    Args:
        model: the base model.
        costs: bytes of each activation, by ``partition_bytes``.
        memory: bytes that a piece may take, weights included.
        providers: those that shall run it.
    """
    held = partial(resident_bytes, providers=providers)
    return tuple(cut_into_partitions(model, wanted=costs.keys(), limit=memory, extra_bytes=costs, weight_bytes=held))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What is observed on which windows, by which session options."""

    directory: ModelDirectory
    groups: tuple[ActivationGroup, ...]
    windows: TokenWindows
    batch_size: int
    device: torch.device
    provider_options: dict[str, dict[str, str]]
    scratch: Path
    """Where a widened copy of the model may lie for a while."""
    processes: Processes

    @property
    def text(self) -> TextShape:
        """The shape of the windows and their batches."""
        return TextShape(
            calibration_windows=len(self.windows.calibration),
            held_out_windows=len(self.windows.held_out),
            seq_len=self.windows.calibration.shape[1],
            batch_size=self.batch_size,
        )

    def cut(self, model: ir.Model, memory: int, providers: tuple[str, ...]) -> tuple[Partition, ...]:
        """Return ``model`` in pieces of at most ``memory`` bytes each, to be run by ``providers``."""
        return cut_to_memory(model, partition_bytes(self.groups, self.text, self.processes), memory, providers)

    def open_first(self, partition: Partition, choice: ProviderChoice) -> ActivationTap:
        """The tap of the first piece, which finds out the providers that work."""
        return open_piece_tap(partition, self.directory, choice, self.provider_options, self.scratch, {})

    def fill(self, writer: CacheWriter, partitions: Sequence[Partition], first: ActivationTap) -> None:
        """Run all windows through ``partitions``, the first of which ``first`` has opened, and save the statistics.

        Ensures: when it returns, all processes have saved theirs.
        """
        with tempfile.TemporaryDirectory(dir=writer.folder) as folder, progress_bar() as bar:
            carried = CarriedValues(Path(folder))
            for index, partition in enumerate(partitions):
                tap = first if index == 0 else self._open_next(partition, first.providers, carried)
                needed = {name for later in partitions[index + 1 :] for name in later.boundary_inputs}
                with tap:
                    self._observe(writer, tap, carried, needed, bar, _label(index, len(partitions)))
        self.processes.barrier()

    def _tokens(self, part: str) -> np.ndarray:
        return self.windows.held_out if part == "held_out" else self.windows.calibration

    def _batches(self, part: str) -> list[np.ndarray]:
        tokens = self._tokens(part)
        return [tokens[start : start + self.batch_size] for start in range(0, len(tokens), self.batch_size)]

    def _open_next(self, partition: Partition, choice: ProviderChoice, carried: CarriedValues) -> ActivationTap:
        types = {name: array.dtype for name, array in carried.read(f"{_PARTS[0]}-0").items()}
        types = self.processes.broadcast(types)  # the only one that always has a batch
        return open_piece_tap(partition, self.directory, choice, self.provider_options, self.scratch, types)

    def _observe(
        self,
        writer: CacheWriter,
        tap: ActivationTap,
        carried: CarriedValues,
        needed: Iterable[str],
        bar: Progress,
        label: str,
    ) -> None:
        """All windows through one piece; every tapped activation is folded into its statistics at once."""
        observed = [group for group in self.groups if group.activation in tap.values]
        owners = self._owners(observed)
        mine = [group for group in observed if owners[group.activation] == self.processes.index]
        found: dict[str, dict[str, StatisticsAccumulator]] = {}
        for part in _PARTS:
            found[part] = {
                group.activation: StatisticsAccumulator(group.activation, self.text.size(group, part), self.device)
                for group in mine
            }
            task = bar.add_task(f"{_NAMES[part]}{label}", total=len(self._tokens(part)), unit="windows")
            for turn, batches in self._turns(part):
                values = self._run_mine(part, turn, tap, carried, frozenset(needed))
                observable = {name: value for name, value in values.items() if name in owners}
                fold_in(found[part], self.processes.exchange(observable, owners), self.device)
                bar.advance(task, sum(map(len, batches)))
        for group in mine:
            held_out, calibration = (found[part].pop(group.activation).finish() for part in _PARTS)
            writer.write(group.activation, ActivationStats(calibration=calibration, held_out=held_out))

    def _owners(self, observed: Sequence[ActivationGroup]) -> dict[str, int]:
        """The process that adds up each activation."""
        shares = split_by_cost([float(group.in_features**2) for group in observed], self.processes.count)
        return {group.activation: _holder(index, shares) for index, group in enumerate(observed)}

    def _turns(self, part: str) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Numbers of the first batches, and the batches, that all processes run at the same time."""
        batches, together = self._batches(part), self.processes.count
        for turn in range(0, len(batches), together):
            yield turn, batches[turn : turn + together]

    def _run_mine(
        self, part: str, turn: int, tap: ActivationTap, carried: CarriedValues, needed: frozenset[str]
    ) -> dict[str, Tensor]:
        """What this process's batch of the turn gives; nothing where there is none left for it."""
        number, batches = turn + self.processes.index, self._batches(part)
        if number >= len(batches):
            return {}
        kept = carried.read(f"{part}-{number}")
        values = dict(tap.run(batches[number], {name: kept[name] for name in tap.boundary_inputs}))
        kept |= {name: value.cpu().numpy() for name, value in values.items() if name in needed}
        carried.keep(f"{part}-{number}", kept, needed)
        return values


def fold_in(
    sums: Mapping[str, StatisticsAccumulator], values: Mapping[str, Sequence[Tensor]], device: torch.device
) -> None:
    """Add ``values`` to the sums of their names, each name's in order.

    On the CPU some names at a time, a thread for each: small products gain little from a second thread.
    """

    def add(name: str) -> None:
        for value in values[name]:
            sums[name].add(value)

    if device.type != "cpu":
        for name in values:
            add(name)
        return
    with one_thread_each(torch.get_num_threads()) as pool:
        deque(pool.map(add, values), maxlen=0)  # map raises what a thread raised, once it is asked for results


def _holder(item: int, shares: Sequence[frozenset[int]]) -> int:
    return next(index for index, share in enumerate(shares) if item in share)


def _label(index: int, partitions: int) -> str:
    return f", part {index + 1} of {partitions}" if partitions > 1 else ""

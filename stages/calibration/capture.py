"""Run the base model on the token windows and accumulate the statistics of every MatMul input: stage one's passes.

The graph runs whole where its weights, the statistics and the tapped activations fit the memory, and else in
partitions, one after the other, each of which saves its statistics before the next one starts. Boundary values, which
one partition computes and a later one reads, go through files, so that each token passes each node once. How much
memory there is and where it cuts the graph is decided here for the run and for the dry run alike.

Processes launched together run a batch each at a time, and each accumulates the statistics of some activations over
the batches of all, in their order: the sums are those of one process, bit for bit, and lie in the memory of all.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import psutil
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from stages.calibration.cache import CacheWriter
from stages.calibration.key_value_scales import KeyValueMaxima
from stages.calibration.on_disk.row_files import RowsWriter
from stages.calibration.on_disk.stream_files import StreamFiles
from stages.calibration.on_disk.unfinished import Reached, Unfinished
from stages.calibration.samples.samples import Samples
from stages.calibration.statistics import StatisticsAccumulator, StatisticsSize, tapped_itemsize
from stages.calibration.text.windows import TokenWindows
from stages.commands.calibrate_options import PART_OF_FREE_MEMORY
from stages.commands.parsing import parse_size
from stages.commands.progress import Progress, progress_bar
from stages.errors import UserError, in_one_line
from stages.model.directory import ModelDirectory
from stages.model.partition import Partition, cut_into_partitions
from stages.records.experts import ExpertLayer
from stages.records.results import ActivationStats
from stages.records.sites import ActivationGroup
from stages.runtime.cpu.upcast import resident_bytes
from stages.runtime.feeds import Batch, CausalFeeds, SampleFeeds
from stages.runtime.providers import ProviderChoice
from stages.runtime.tap import ActivationTap, FeedsOpener, open_partition_tap
from stages.system.distributed import Processes, split_by_cost
from stages.system.hardware import one_thread_each
from stages.system.shared_folder import wait_for

_PARTS: Mapping[str, str] = MappingProxyType({"held_out": "held-out", "calibration": "calibration"})
"""What is run, in this order, and what the progress bar calls it."""
SAVED_EVERY = 60.0
"""Seconds."""
_MAXIMA = "kv-maxima.safetensors"
_ROWS_OF_SAMPLE = 1500
"""As many as Whisper's encoder has; those of images have 200 to 1400."""
PRIOR = 4
"""Every expert is calibrated on K / PRIOR tokens of its whole layer beside its own."""
SumsByFile = dict[str, Callable[[], Mapping[str, Tensor]]]
"""What makes the tensors of a file: packed copies of all sums at once would take half as much memory again."""
_NO_ROWS: Mapping[str, KeptRows] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The windows that stage one runs on."""

    calibration_windows: int
    held_out_windows: int
    seq_len: int | None
    """None where they are samples of sizes of their own."""
    batch_size: int

    @property
    def rows_at_once(self) -> int:
        """Return how many rows of an activation a batch has; for samples a guess."""
        return _ROWS_OF_SAMPLE if self.seq_len is None else self.batch_size * self.seq_len

    def size(self, group: ActivationGroup, part: str) -> StatisticsSize:
        """Return the size of the statistics of ``group`` on the windows of ``part``."""
        expert = group.sites[0].expert
        every = self.tokens(part)
        if expert is not None and every is not None:
            tokens = int(every * expert.share) + min(every, group.in_features // PRIOR)
            return StatisticsSize(in_features=group.in_features, tokens=tokens, itemsize=torch.float32.itemsize)
        return StatisticsSize(
            in_features=group.in_features,
            tokens=every,
            itemsize=tapped_itemsize(group.sites[0].dtype),
        )

    def tokens(self, part: str) -> int | None:
        """Return the number of tokens in the windows of ``part``; None of samples."""
        if self.seq_len is None:
            return None
        return (self.held_out_windows if part == "held_out" else self.calibration_windows) * self.seq_len


def memory_limit(max_memory: str | None, device: torch.device, sharing: int) -> int:
    """Return the bytes that a partition of the graph may take in one process.

    Args:
        max_memory: the option's text, which decides where it is given; else a part of the free memory is used.
        device: where statistics are added up; on CUDA its free memory counts too.
        sharing: processes on this machine, which share its free memory.

    Raises:
        OptionError: ``max_memory`` isn't a size.
    """
    if max_memory is not None:
        return parse_size(max_memory, "--max_memory")
    free = psutil.virtual_memory().available // sharing
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return int(free * PART_OF_FREE_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRows:
    """A value of which every token's row is kept, on the disk."""

    columns: int
    itemsize: int

    def bytes(self, tokens: int) -> int:
        """Return the bytes of so many tokens' rows."""
        return tokens * self.columns * self.itemsize


def rows_of(layers: Iterable[ExpertLayer]) -> dict[str, KeptRows]:
    """Return the values that experts share: what their node reads, and the router's scores."""
    found: dict[str, KeptRows] = {}
    for layer in layers:
        itemsize = tapped_itemsize(layer.dtype)
        found[layer.tokens] = KeptRows(columns=layer.hidden, itemsize=itemsize)
        found[layer.scores] = KeptRows(columns=layer.experts, itemsize=itemsize)
    return found


def partition_bytes(
    groups: Iterable[ActivationGroup], text: TextShape, processes: int, rows: Mapping[str, KeptRows] = _NO_ROWS
) -> dict[str, int]:
    """Return by activation the bytes that one process holds of it: its share of the statistics, and one batch.

    Args:
        groups: the activations.
        text: the windows that are run.
        processes: how many share the statistics.
        rows: values whose rows are kept on the disk; only a batch of them is in memory.
    """

    def held(group: ActivationGroup) -> int:
        sizes = [text.size(group, part) for part in _PARTS]
        batch = text.rows_at_once * group.in_features * sizes[0].itemsize
        return batch + sum(size.memory for size in sizes) // processes

    kept = {name: each.bytes(text.rows_at_once) for name, each in rows.items()}
    return kept | {group.activation: held(group) for group in groups}


def cache_bytes(
    groups: Iterable[ActivationGroup], text: TextShape, rows: Mapping[str, KeptRows], *, weighs: bool
) -> int:
    """Return the bytes of a cache.

    Args:
        groups: the activations.
        text: the windows that are run.
        rows: values whose rows are kept.
        weighs: whether statistics are kept with the tokens' weights as well as without.
    """
    tokens = sum(text.tokens(part) or 0 for part in _PARTS)
    statistics = sum(text.size(group, part).disk for group in groups for part in _PARTS)
    return (2 if weighs else 1) * statistics + sum(each.bytes(tokens) for each in rows.values())


def cut_to_memory(
    model: ir.Model, costs: Mapping[str, int], memory: int, providers: tuple[str, ...]
) -> tuple[Partition, ...]:
    """Return ``model`` in partitions that fit the memory.

    Args:
        model: the base model.
        costs: bytes of each activation, by ``partition_bytes``.
        memory: bytes that a partition may take, weights included.
        providers: those that shall run it.
    """
    weight_bytes = partial(resident_bytes, providers=providers)
    cut = cut_into_partitions(model, wanted=costs.keys(), limit=memory, extra_bytes=costs, weight_bytes=weight_bytes)
    return tuple(cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A model, the activations that are captured of it, the windows that it runs on, and how it runs."""

    model: ir.Model
    directory: ModelDirectory
    groups: tuple[ActivationGroup, ...]
    windows: TokenWindows | Samples
    batch_size: int
    device: torch.device
    """Where statistics are added up."""
    choice: ProviderChoice
    provider_options: dict[str, dict[str, str]]
    scratch: Path
    """Where a float32 copy of the model may lie for a while."""
    processes: Processes
    rows: Mapping[str, KeptRows] = field(default_factory=dict)
    """Values of which every token's row is kept."""
    streams: StreamFiles | None = None
    """Where what enters each layer is kept too, as far as the graph names it; None: it isn't wanted."""
    maxima: KeyValueMaxima | None = None
    """Collects the largest keys and values; None: they aren't wanted."""

    @property
    def text(self) -> TextShape:
        """Return the shape of the windows and their batches."""
        return TextShape(
            calibration_windows=len(self.windows.calibration),
            held_out_windows=len(self.windows.held_out),
            seq_len=self.windows.seq_len,
            batch_size=self.batch_size,
        )

    def cut(self, memory: int, processes: int) -> tuple[Partition, ...]:
        """Return the model in partitions of at most ``memory`` bytes each.

        Args:
            memory: in bytes.
            processes: those that share the sums.
        """
        costs = partition_bytes(self.groups, self.text, processes, self.rows)
        batch = self.text.rows_at_once * self.groups[0].in_features * torch.float32.itemsize
        looked_at = dict.fromkeys([*self._kept_streams, *self._key_values], batch)
        return cut_to_memory(self.model, looked_at | costs, memory, self.choice.names)

    @property
    def _key_values(self) -> tuple[str, ...]:
        return () if self.maxima is None else self.maxima.names

    @property
    def _kept_streams(self) -> dict[str, int]:
        """Return the places in the chain of the values that are kept as they are, by name: those that nodes compute."""
        if self.streams is None:
            return {}
        computed = {output.name for node in self.model.graph for output in node.outputs}
        return {name: place for place, name in enumerate(self.streams.names) if place and name in computed}

    def open_first(self, partition: Partition) -> ActivationTap:
        """Open the tap of the first partition, which finds out the providers that work."""
        return self._open(partition, self.choice, {})

    def fill(
        self, writer: CacheWriter, partitions: Sequence[Partition], first: ActivationTap, unfinished: Unfinished
    ) -> None:
        """Run all windows through ``partitions`` and save the statistics; what is finished isn't run again.

        Ensures: when it returns, all processes have saved theirs, and the first one sees the files.

        Args:
            writer: the cache that is filled.
            partitions: the model, in this order.
            first: the tap of the first of them; it is closed when that one is done, as each other is.
            unfinished: what an earlier run has finished, and where this one keeps what it finishes.
        """
        reached = unfinished.reached
        if self.maxima is not None:
            self.maxima.found.update(unfinished.load(_MAXIMA))
        with progress_bar() as bar:
            for index, partition in enumerate(partitions):
                boundary = _BoundaryValues(
                    before=unfinished.folder / f"boundary-{index - 1}",
                    after=unfinished.folder / f"boundary-{index}",
                    needed=frozenset(name for later in partitions[index + 1 :] for name in later.boundary_inputs),
                )
                if index < reached.partitions:
                    with first:  # what it is opened for is known
                        continue
                tap = first if index == 0 else self._open_next(partition, first.providers, boundary)
                label = f", part {index + 1} of {len(partitions)}" if len(partitions) > 1 else ""
                with tap:
                    written = self._run_partition(writer, tap, boundary, bar, label, unfinished)
                if index + 1 == len(partitions) and self.maxima is not None and self.processes.is_first:
                    written.append(writer.write_maxima(self.maxima.found))
                unfinished.note(Reached(partitions=index + 1), written)
                if len(partitions) > 1 or unfinished.is_due(SAVED_EVERY):
                    unfinished.save(self._found_maxima)
                if self.processes.is_first:
                    shutil.rmtree(boundary.before, ignore_errors=True)
        self.processes.barrier()
        if self.processes.is_first:
            wait_for(writer.folder / name for name in writer.files.values())
            if self.streams is not None and not reached.streams:  # else the way back has begun to remove them
                wait_for(self.streams.files(self._kept_streams.values()))

    @property
    def _found_maxima(self) -> SumsByFile:
        """Return the largest keys and values so far, which the first process collects, by the name of their file."""
        maxima = self.maxima
        return (
            {} if maxima is None or not maxima.found or not self.processes.is_first else {_MAXIMA: lambda: maxima.found}
        )

    @property
    def kept_places(self) -> frozenset[int]:
        """Return the places in the chain of which ``fill`` keeps what enters them."""
        return frozenset(self._kept_streams.values())

    def _open(
        self, partition: Partition, choice: ProviderChoice, boundary_types: Mapping[str, np.dtype[np.generic]]
    ) -> ActivationTap:
        return open_partition_tap(
            partition, self.directory, choice, self.provider_options, self.scratch, boundary_types, self._make_feeds
        )

    @property
    def _make_feeds(self) -> FeedsOpener:
        if isinstance(self.windows, Samples):
            return partial(SampleFeeds.of, names=self.windows.names)
        return CausalFeeds.of

    def _open_next(self, partition: Partition, choice: ProviderChoice, boundary: _BoundaryValues) -> ActivationTap:
        # The first process is the only one that always has a batch.
        types = {name: array.dtype for name, array in boundary.read("held_out", 0).items()}
        return self._open(partition, choice, self.processes.broadcast(types))

    def _run_partition(
        self,
        writer: CacheWriter,
        tap: ActivationTap,
        boundary: _BoundaryValues,
        bar: Progress,
        label: str,
        unfinished: Unfinished,
    ) -> list[Path]:
        """Run all windows through one partition; return the files of this process's statistics."""
        gathered = self._begin(writer, tap, unfinished.reached)
        text, unit = ("text", "windows") if isinstance(self.windows, TokenWindows) else ("samples", "samples")
        for part, title in _PARTS.items():
            gathered.sums[part] = self._sums_so_far(gathered.groups, part, writer, unfinished)
            batches, begin = self._batches(part), gathered.batches.get(part, 0)
            task = bar.add_task(
                f"{title} {text}{label}",
                total=self._count(batches),
                unit=unit,
                done=self._count(batches[:begin]),
                keeps=f"{unit}, but for the last minute's,",
            )
            for start in range(begin, len(batches), self.processes.count):
                self._gather(gathered, part, self._run_turn(part, start, tap, boundary, gathered.owners), writer)
                gathered.batches[part] = min(start + self.processes.count, len(batches))
                if unfinished.is_due(SAVED_EVERY):
                    reached = replace(unfinished.reached, batches=dict(gathered.batches))
                    unfinished.note(reached, self._files(writer, gathered.rows))
                    unfinished.save(self._states(writer, gathered.sums) | self._found_maxima)
                bar.advance(task, self._count(batches[start : start + self.processes.count]))
        self._finish(gathered, writer)
        statistics = (writer.folder / writer.files[group.activation] for group in gathered.groups)
        return [*statistics, *self._files(writer, gathered.rows)]

    def _begin(self, writer: CacheWriter, tap: ActivationTap, reached: Reached) -> _Gathered:
        """Return what this process gathers of a partition, of which an earlier run has ``reached`` so much."""
        groups = [group for group in self.groups if group.activation in tap.values]
        owners = self._owners(groups, [name for name in (*self.rows, *self._key_values) if name in tap.values])
        mine = [group for group in groups if owners[group.activation] == self.processes.index]
        done = dict(reached.batches)
        rows = [name for name in self.rows if owners.get(name) == self.processes.index]
        return _Gathered(owners=owners, groups=mine, rows=self._row_writers(writer, rows, done), batches=done)

    def _gather(
        self, gathered: _Gathered, part: str, received: Mapping[str, Sequence[Tensor]], writer: CacheWriter
    ) -> None:
        """Add what a turn of all processes gave to what this one gathers."""
        self._add_largest(received)
        sums = gathered.sums[part]
        fold_in(sums, {name: received[name] for name in received if name in sums}, self.device)
        with writer.place_for("rows"):
            for name in gathered.rows.keys() & received.keys():
                for value in received[name]:
                    gathered.rows[name].add(part, value)

    def _finish(self, gathered: _Gathered, writer: CacheWriter) -> None:
        """Save the statistics of each activation, which leave the memory."""
        for group in gathered.groups:
            held_out, calibration = (gathered.sums[part].pop(group.activation).finish() for part in _PARTS)
            writer.write(group.activation, ActivationStats(calibration=calibration, held_out=held_out))

    def _sums_so_far(
        self, groups: Iterable[ActivationGroup], part: str, writer: CacheWriter, unfinished: Unfinished
    ) -> dict[str, StatisticsAccumulator]:
        """Return the sums of one part of the text, by activation, as an earlier run has left them."""
        sums: dict[str, StatisticsAccumulator] = {}
        for group in groups:
            name = group.activation
            sums[name] = StatisticsAccumulator(name, self.text.size(group, part), self.device)
            sums[name].go_on(_of_part(part, unfinished.load(writer.files[name])))
        return sums

    def _states(self, writer: CacheWriter, sums: Mapping[str, Mapping[str, StatisticsAccumulator]]) -> SumsByFile:
        """Return what ``sums``, by part and activation, hold, by the name of the activation's file."""

        def state_of(name: str) -> dict[str, Tensor]:
            return {f"{part}.{key}": tensor for part in sums for key, tensor in sums[part][name].state().items()}

        names = {name for of_part in sums.values() for name in of_part}
        return {writer.files[name]: partial(state_of, name) for name in names}

    def _files(self, writer: CacheWriter, rows: Iterable[str]) -> list[Path]:
        """Return the files that runs fill batch by batch, as far as they are there."""
        streams = [] if self.streams is None else self.streams.files(self._kept_streams.values())
        return [file for file in (*(writer.folder / writer.rows[name] for name in rows), *streams) if file.exists()]

    def _run_turn(
        self,
        part: str,
        start: int,
        tap: ActivationTap,
        boundary: _BoundaryValues,
        owners: Mapping[str, int],
    ) -> dict[str, list[Tensor]]:
        """Run a batch in each process, from number ``start`` on; return what is this one's of all of them, in order."""
        number = start + self.processes.index
        values: dict[str, Tensor] = {}  # of this process's batch, if there is one left for it
        if number < len(self._batches(part)):
            values = self._run_batch(part, number, tap, boundary)
        values = {name: value for name, value in values.items() if name in owners}
        return self.processes.exchange(self._with_largest(values), owners)

    def _run_batch(self, part: str, number: int, tap: ActivationTap, boundary: _BoundaryValues) -> dict[str, Tensor]:
        """Return all that ``tap`` gives for a batch, and keep what later partitions need of it and of earlier ones."""
        known = boundary.read(part, number)
        values = dict(tap.run(self._batches(part)[number], {name: known[name] for name in tap.boundary_inputs}))
        known |= {name: value.cpu().numpy() for name, value in values.items() if name in boundary.needed}
        boundary.keep(part, number, known)
        self._keep_streams(part, number, values)
        return values

    def _keep_streams(self, part: str, number: int, values: Mapping[str, Tensor]) -> None:
        if self.streams is None:
            return
        before = 0 if part == "calibration" else len(self.windows.calibration)
        for name, place in self._kept_streams.items():
            if name in values:
                self.streams.keep(place, before + number * self.batch_size, values[name])

    def _with_largest(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``values`` with the largest numbers of keys and values in their place."""
        maxima = self.maxima
        if maxima is None:
            return dict(values)
        return {name: maxima.largest(name, each) if name in maxima.names else each for name, each in values.items()}

    def _add_largest(self, received: Mapping[str, Sequence[Tensor]]) -> None:
        for name in received.keys() & set(self._key_values):
            for largest in received[name]:
                assert self.maxima is not None
                self.maxima.add(name, largest.cpu())

    def _row_writers(
        self, writer: CacheWriter, names: Collection[str], done: Mapping[str, int]
    ) -> dict[str, RowsWriter]:
        """Return a writer for each of ``names``; of each part so many batches are ``done``."""
        if not names:
            return {}
        assert isinstance(self.windows, TokenWindows), "rows are kept of windows"
        windows = {"calibration": self.windows.calibration, "held_out": self.windows.held_out}
        counts = {part: tokens.size for part, tokens in windows.items()}
        length = self.windows.seq_len
        filled = {part: self._count(self._batches(part)[:batches]) * length for part, batches in done.items()}
        return {name: RowsWriter(writer.folder / writer.rows[name], name, counts, filled) for name in names}

    def _owners(self, groups: Sequence[ActivationGroup], rows: Iterable[str]) -> dict[str, int]:
        """Return by value the process that accumulates or keeps it, in the same order everywhere."""
        shares = split_by_cost([float(group.in_features**2) for group in groups], self.processes.count)
        owners = {index: process for process, share in enumerate(shares) for index in share}
        found = {group.activation: owners[index] for index, group in enumerate(groups)}
        return dict.fromkeys(rows, 0) | found

    def _batches(self, part: str) -> Sequence[Batch]:
        return self.windows.batches(part, self.batch_size)

    def _count(self, batches: Sequence[Batch]) -> int:
        """Return how many windows or samples there are in some batches."""
        return sum(len(batch) if isinstance(batch, np.ndarray) else 1 for batch in batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered:
    """What one process gathers of a partition."""

    owners: Mapping[str, int]
    """By value the process that gathers it."""
    groups: Sequence[ActivationGroup]
    """Those whose statistics it adds up."""
    rows: Mapping[str, RowsWriter]
    """By value of which every token's row is kept."""
    batches: dict[str, int]
    """How many were run, of all processes, by part of the text."""
    sums: dict[str, dict[str, StatisticsAccumulator]] = field(default_factory=dict)
    """By part of the text and activation; a part's from its beginning on."""


def fold_in(
    sums: Mapping[str, StatisticsAccumulator], values: Mapping[str, Sequence[Tensor]], device: torch.device
) -> None:
    """Add each of ``values`` to the sums of its name, in order.

    On the CPU several names are added at a time, each in a thread of its own: small products gain little from a second
    thread.

    Args:
        sums: by activation.
        values: what is added, by activation.
        device: where the sums live.
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


def _of_part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): each for name, each in tensors.items() if name.startswith(f"{part}.")}


@dataclass(frozen=True, slots=True, kw_only=True)
class _BoundaryValues:
    """What partitions compute for later ones: a file for each batch.

    A partition that is run again finds what was there before it.
    """

    before: Path
    """Folder of what earlier partitions have computed; it need not exist."""
    after: Path
    """Folder for what is there after this one."""
    needed: frozenset[str]
    """Names of what later partitions read."""

    def read(self, part: str, batch: int) -> dict[str, np.ndarray]:
        """Return everything that was kept for a batch; nothing before its first partition."""
        file = self.before / _boundary_file(part, batch)
        return load_file(file) if file.is_file() else {}

    def keep(self, part: str, batch: int, values: Mapping[str, np.ndarray]) -> None:
        """Keep those of a batch's ``values`` that are needed.

        Raises:
            UserError: the disk is full.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in values.items() if name in self.needed}
        if not arrays:
            return
        try:
            self.after.mkdir(parents=True, exist_ok=True)
            save_file(arrays, self.after / _boundary_file(part, batch))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"What one part of the model hands to the next can't be written to {self.after.parent.parent} "
                f"({in_one_line(error)}); free space there, choose another --cache_dir, or raise --max_memory."
            ) from error


def _boundary_file(part: str, batch: int) -> str:
    return f"{part}-{batch}.safetensors"

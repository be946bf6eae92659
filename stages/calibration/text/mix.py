"""Share the windows among the data sets of ``--dataset`` by weight: ``mix=3,notes.txt=1``; mix has fixed parts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType

from stages.errors import UserError

SELF_GENERATED = "self"
"""The data set that the model writes itself; there are no documents of it."""
OFFLINE, CODE, LANGUAGES, ARITHMETIC = "offline", "code", "languages", "arithmetic"
RANDOM = "random"
"""The data set of uniformly random tokens."""
MIX = "mix"
MIX_PARTS: Mapping[str, int] = MappingProxyType(
    {SELF_GENERATED: 45, OFFLINE: 20, CODE: 15, LANGUAGES: 8, ARITHMETIC: 7, RANDOM: 5}
)
"""What mix consists of, in percent of the windows."""
LEAST_WINDOWS = 2
"""Windows of a data set: one to calibrate on, one held out."""
_HELD_OUT_SHARE = 10
_WEIGHTED = re.compile(r"(.+)=([1-9]\d*)")


def dataset_names(dataset: str) -> tuple[str, ...]:
    """Return the data sets that ``--dataset`` names, separated by commas, without their weights.

    A file that is there may have commas in its name.

    Raises:
        UserError: a name is missing between two commas, or comes twice.
    """
    return tuple(_named(dataset))


def dataset_parts(dataset: str) -> tuple[str, ...]:
    """Return the data sets that ``--dataset`` names, with the parts of mix in its place.

    Raises:
        UserError: ``dataset`` isn't a list of names.
    """
    return tuple(_weights(_named(dataset)))


def windows_by_dataset(dataset: str, windows: int, *, without: Collection[str] = ()) -> dict[str, int]:
    """Return how many windows each data set gives, as its weight says; mix is given as its parts.

    Parts of mix that would get fewer than two windows are left out.

    Args:
        dataset: what ``--dataset`` names.
        windows: of all data sets together.
        without: parts of mix that can't be had.

    Raises:
        UserError: there are fewer than two windows for a data set, or ``dataset`` isn't a list of names.
    """
    named = _named(dataset)
    weights = {name: weight for name, weight in _weights(named).items() if name not in without}
    shares = _shares(weights, windows)
    while min(shares.values()) < LEAST_WINDOWS:
        optional = [name for name in weights if name not in named]
        if not optional or len(weights) == 1:
            enough = next(
                n for n in count(LEAST_WINDOWS * len(weights)) if min(_shares(weights, n).values()) >= LEAST_WINDOWS
            )
            raise UserError(
                f"--calib_size {windows} is too small for --dataset {dataset}; each data set needs a window to "
                f"calibrate on and one held out, so pass {enough} or more."
            )
        del weights[min(reversed(optional), key=weights.__getitem__)]
        shares = _shares(weights, windows)
    return shares


def held_out_windows(shares: Mapping[str, int]) -> dict[str, int]:
    """Return how many windows of each data set are held out: a tenth, at least one, and no random tokens beside text.

    Args:
        shares: windows by data set.
    """
    return {
        name: 0 if name == RANDOM and len(shares) > 1 else max(1, round(windows / _HELD_OUT_SHARE))
        for name, windows in shares.items()
    }


def _named(dataset: str) -> dict[str, int]:
    """Return the weight of each name."""
    if Path(dataset).is_file():
        return {dataset: 1}
    found: dict[str, int] = {}
    for entry in map(str.strip, dataset.split(",")):
        weighted = None if Path(entry).is_file() else _WEIGHTED.fullmatch(entry)
        name, weight = (entry, 1) if weighted is None else (weighted[1].strip(), int(weighted[2]))
        if not name:
            raise UserError(f"--dataset {dataset} has a comma without a name beside it; remove it.")
        if name in found:
            raise UserError(f"--dataset names {name} twice; give it more windows with {name}=2.")
        found[name] = weight
    return found


def _weights(named: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each data set in all windows, mix as its parts; they sum to 1."""
    total, whole = sum(named.values()), sum(MIX_PARTS.values())
    weights: dict[str, float] = {}
    for name, weight in named.items():
        parts = {part: share / whole for part, share in MIX_PARTS.items()} if name == MIX else {name: 1.0}
        for part, share in parts.items():
            weights[part] = weights.get(part, 0.0) + share * weight / total
    return weights


def _shares(weights: Mapping[str, float], windows: int) -> dict[str, int]:
    """Return whole numbers of windows: what rounding down leaves goes to the largest remainders, to the first first."""
    exact = {name: windows * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(share + 1e-9) for name, share in exact.items()}
    left = windows - sum(shares.values())
    for name in sorted(shares, key=lambda name: round(shares[name] - exact[name], 9))[:left]:
        shares[name] += 1
    return shares

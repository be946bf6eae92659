"""A folder of quantized weights: recipe.json, and one safetensors file for each finished group and embedding.

A file gets its name when it is whole, so a search that was stopped resumes at the first group that has none; a folder
with another recipe is refused. The export reads one tensor of one site at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import CacheMismatch, OptionError, UserError, in_one_line
from stages.quantization.weights.byte_scales import stored_bytes
from stages.quantization.weights.embedding_file import TableFile
from stages.quantization.weights.validate import InvalidFile, PartName, require_part, require_recipe, require_spec
from stages.records.formats import QuantSpec
from stages.records.results import ExportRecipe, QuantizedTable, QuantizedWeight, SiteReport, SolvedGroup
from stages.records.sites import MatMulSite
from stages.system.atomic import atomic_file, is_occupied
from stages.system.json_file import first_fault, read_json, write_json
from stages.system.paths import reachable

RECIPE = "recipe.json"
REPORT = "report.jsonl"
VERIFICATION = "verification.json"
REPORT_FOLDER = "report"
"""Folder of the HTML report of a run, inside that of its weights."""
EARLIER = "earlier"
"""Folder of the weights that block-level tuning starts from, inside that of its result."""
_SECONDS = "seconds.json"
_LONGEST_SLUG = 150
_SUFFIXES = frozenset({".json", ".jsonl", ".toml", ".safetensors"})
_RECIPES = TypeAdapter(ExportRecipe)
_REPORTS = TypeAdapter(tuple[SiteReport, ...])
_SPECS = TypeAdapter(dict[str, QuantSpec])
_SECONDS_RECORD = TypeAdapter(float)


@dataclass(frozen=True, slots=True)
class QuantizedStore:
    """An open folder of quantized weights."""

    folder: Path
    recipe: ExportRecipe

    def group_file(self, index: int) -> Path:
        """Return the path of group ``index``'s file, named after its first site so that people find it."""
        return self.folder / f"{index:04d}.{_slug(self.recipe.groups[index].sites[0].name)}.safetensors"

    def table_file(self, index: int) -> TableFile:
        """Return the file of embedding ``index``, named after its initializer."""
        name = _slug(self.recipe.embeddings[index].table.weight)
        return TableFile(self.folder / f"embedding.{index:04d}.{name}.safetensors", self.recipe.embeddings[index])

    def has_table(self, index: int) -> bool:
        """Return whether embedding ``index`` was written, by itself or as the weight of the lm_head that it shares."""
        shared = self.recipe.embeddings[index].shared_with
        if shared is None:
            return self.table_file(index).is_finished()
        groups = enumerate(self.recipe.groups)
        return any(self.is_finished(place) for place, group in groups for site in group.sites if site.name == shared)

    def is_finished(self, index: int) -> bool:
        """Return whether group ``index`` was written."""
        return self.group_file(index).is_file()

    def is_complete(self) -> bool:
        """Return whether every group was written."""
        return all(self.is_finished(index) for index in range(len(self.recipe.groups)))

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was written yet."""
        return not any(self.folder.rglob("*.safetensors"))

    def discard(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, index: int, solved: SolvedGroup) -> None:
        """Write group ``index``; the file gets its name when it is whole."""
        tensors: dict[str, Tensor] = {}
        for weight in solved.weights:
            tensors |= _as_tensors(weight)
        specs = {weight.site.name: weight.spec for weight in solved.weights}
        metadata = {
            "specs": _SPECS.dump_json(specs).decode(),
            "reports": _REPORTS.dump_json(solved.reports).decode(),
        }
        with self._explained_writes(), atomic_file(self.group_file(index)) as partial:
            save_file(tensors, partial, metadata)

    def read_group(self, index: int) -> SolvedGroup:
        """Load finished group ``index``.

        Raises:
            OptionError: the group's file is missing or damaged.
        """
        group = self.recipe.groups[index]
        weights = tuple(self.read(index, site) for site in group.sites)
        return SolvedGroup(group=group, weights=weights, reports=self._reports(index))

    def reports(self) -> list[SiteReport]:
        """Load the reports of all finished groups, in graph order."""
        finished = filter(self.is_finished, range(len(self.recipe.groups)))
        return [report for index in finished for report in self._reports(index)]

    def write_report(self) -> Path:
        """Write report.jsonl, one line a site, from the finished groups; return its path."""
        path = self.folder / REPORT
        lines = [TypeAdapter(SiteReport).dump_json(report).decode() for report in self.reports()]
        with self._explained_writes(), atomic_file(path) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def seconds(self) -> float:
        """Return how long the search took, all runs together; of weights of earlier versions the sites' own seconds."""
        kept = read_json(self.folder / _SECONDS, _SECONDS_RECORD)
        return sum(report.seconds for report in self.reports()) if kept is None else kept

    def add_seconds(self, seconds: float) -> None:
        """Add to what ``seconds`` returns; where that can't be kept, leave it."""
        path = self.folder / _SECONDS
        with suppress(OSError):
            write_json(path, _SECONDS_RECORD, seconds + (read_json(path, _SECONDS_RECORD) or 0.0))

    def write_table(self, index: int, table: QuantizedTable) -> None:
        """Write embedding ``index``; the file gets its name when it is whole."""
        with self._explained_writes():
            self.table_file(index).write(table)

    def spec(self, index: int, site: MatMulSite) -> QuantSpec:
        """Return the format of one site's weight; no tensor is read.

        Raises:
            OptionError: the group's file is missing or damaged.
        """
        return self._load(index, site, ())[0]

    def tensor(self, index: int, site: MatMulSite, part: PartName) -> Tensor | None:
        """Load one tensor of one site's weight; None where the weight needs no such part.

        Args:
            index: the group's place in the recipe.
            site: one of the group's sites.
            part: which tensor to read; the others stay on disk.

        Raises:
            OptionError: the group's file is missing or damaged.
        """
        return self._load(index, site, (part,))[1].get(part)

    def read(self, index: int, site: MatMulSite) -> QuantizedWeight:
        """Load one site's whole weight.

        Raises:
            OptionError: the group's file is missing or damaged.
        """
        spec, parts = self._load(index, site, ("codes", "scales", "zero_points", "input_scale"))
        return QuantizedWeight(
            site=site,
            spec=spec,
            codes=parts["codes"],
            scales=parts["scales"],
            zero_points=parts.get("zero_points"),
            input_scale=parts.get("input_scale"),
        )

    def _load(
        self, index: int, site: MatMulSite, wanted: tuple[PartName, ...]
    ) -> tuple[QuantSpec, dict[PartName, Tensor]]:
        parts: dict[PartName, Tensor] = {}
        with self._explained_reads(index) as path, safe_open(path, "pt") as file:
            spec = _found(_SPECS.validate_json(_entry(file.metadata(), "specs")), site)
            names = set(file.keys())
            for part in wanted:
                name = f"{site.name}:{part}"
                if name in names:
                    parts[part] = file.get_tensor(name)
                require_part(part, parts.get(part), site, spec)
        return spec, parts

    def _reports(self, index: int) -> tuple[SiteReport, ...]:
        with self._explained_reads(index) as path, safe_open(path, "pt") as file:
            reports = _REPORTS.validate_json(_entry(file.metadata(), "reports"))
            specs = _SPECS.validate_json(_entry(file.metadata(), "specs"))
        if not self.recipe.byte_scales:
            return reports
        sites = {site.name: site for site in self.recipe.groups[index].sites if site.expert is None}
        return tuple(
            replace(report, bytes=self._bytes(site, specs)) if (site := sites.get(report.site)) is not None else report
            for report in reports
        )

    def _bytes(self, site: MatMulSite, specs: Mapping[str, QuantSpec]) -> int:
        """Return what a site takes where scales are bytes, which a search doesn't know."""
        return stored_bytes(site, _found(specs, site), self.recipe.weight_form, byte_scales=True)

    @contextmanager
    def _explained_writes(self) -> Iterator[None]:
        """Raise UserError where the block can't write."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Quantized weights can't be written to {self.folder} ({in_one_line(error)}); free space there, or "
                "choose another folder with --weights_path."
            ) from error

    @contextmanager
    def _explained_reads(self, index: int) -> Iterator[Path]:
        """Yield the path of group ``index``'s file; raise OptionError where the block can't read it."""
        path = self.group_file(index)
        try:
            yield path
        except (OSError, SafetensorError, ValidationError, InvalidFile) as error:
            raise OptionError(
                f"{path} is missing or damaged ({in_one_line(error)}); run stages.quantize again to complete it."
            ) from error


def open_store(folder: Path) -> QuantizedStore:
    """Open the folder of an earlier run.

    Raises:
        OptionError: there is no readable recipe.json.
    """
    folder = reachable(folder)
    path = folder / RECIPE
    try:
        recipe = _RECIPES.validate_json(path.read_bytes())
        require_recipe(recipe)
    except (FileNotFoundError, NotADirectoryError) as error:
        lacks = f"has no {RECIPE}, so it holds no quantized weights" if folder.is_dir() else "is not a folder"
        raise OptionError(f"{folder} {lacks}; pass the folder that stages.quantize wrote its weights to.") from error
    except (OSError, ValidationError, InvalidFile) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else in_one_line(error)
        raise OptionError(
            f"{path} can't be read ({reason}); pass the folder that stages.quantize wrote its weights to."
        ) from error
    return QuantizedStore(folder, recipe)


def create_or_resume_store(folder: Path, recipe: ExportRecipe, *, overwrite: bool) -> QuantizedStore:
    """Start a folder for ``recipe``, or open one that has exactly this recipe.

    Args:
        folder: where the weights go.
        recipe: what is to be computed.
        overwrite: replace the weights of another recipe.

    Raises:
        CacheMismatch: the folder holds another recipe's weights and ``overwrite`` is off.
        UserError: the folder can't be written.
    """
    folder = reachable(folder)
    path = folder / RECIPE
    if path.is_file():
        if path.read_bytes() == _RECIPES.dump_json(recipe, indent=1):
            return QuantizedStore(folder, recipe)
        if not overwrite:
            raise CacheMismatch(
                f"{folder} holds weights of another run ({_summary(path)}); choose another --weights_path or pass "
                "--overwrite to replace them."
            )
        _require_only_weights(folder)
        shutil.rmtree(folder)
    elif is_occupied(folder):
        raise UserError(f"--weights_path {folder} is not empty and holds no recipe.json; choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_bytes(_RECIPES.dump_json(recipe, indent=1))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise UserError(f"--weights_path {folder} can't be written ({error.strerror}); choose another.") from error
    return QuantizedStore(folder, recipe)


def _require_only_weights(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.suffix not in _SUFFIXES and entry.name not in (EARLIER, REPORT_FOLDER):
            raise UserError(
                f"--weights_path {folder} holds {entry} beside quantized weights, so it isn't replaced; choose another "
                "folder."
            )


def _summary(recipe_file: Path) -> str:
    try:
        return str(json.loads(recipe_file.read_text(encoding="utf-8"))["summary"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return "unreadable recipe.json"


def _entry(metadata: dict[str, str] | None, key: str) -> str:
    text = (metadata or {}).get(key)
    if text is None:
        raise InvalidFile(f"it has no {key}")
    return text


def _found(specs: Mapping[str, QuantSpec], site: MatMulSite) -> QuantSpec:
    if site.name not in specs:
        raise InvalidFile(f"its specs don't name '{site.name}'")
    require_spec(specs[site.name], site)
    return specs[site.name]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", ".", name).strip(".")[:_LONGEST_SLUG]


def _as_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    parts = {
        "codes": weight.codes,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "input_scale": weight.input_scale,
    }
    return {f"{weight.site.name}:{key}": _owned(tensor) for key, tensor in parts.items() if tensor is not None}


def _owned(tensor: Tensor) -> Tensor:
    """Return a tensor that shares its storage with no other, as safetensors asks: siblings share one input scale."""
    whole = tensor.cpu().contiguous()
    return whole.clone() if tensor.ndim == 1 or whole.untyped_storage().nbytes() != whole.nbytes else whole

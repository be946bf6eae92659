"""A folder of quantized weights: recipe.json, and one safetensors file for each finished group and embedding.

Each file appears only when whole, so a search that is stopped resumes at the first group that has none; a folder whose
recipe differs is refused. The exporter reads weights one site at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.atomic import whole_file
from stages.errors import CacheMismatch, RecipeError, UserError
from stages.records import ExportRecipe, MatMulSite, QuantizedWeight, QuantSpec, SiteReport, SolvedGroup
from stages.table_file import TableFile

RECIPE = "recipe.json"
REPORT = "report.jsonl"
_RECIPES = TypeAdapter(ExportRecipe)
_REPORTS = TypeAdapter(tuple[SiteReport, ...])
_SPECS = TypeAdapter(dict[str, QuantSpec])


@dataclass(frozen=True, slots=True)
class QuantizedStore:
    """An open folder of quantized weights; see the module's text."""

    folder: Path
    recipe: ExportRecipe

    def group_file(self, index: int) -> Path:
        """Path of group ``index``'s file, named after its first site so that people find it."""
        return self.folder / f"{index:04d}.{_slug(self.recipe.groups[index].sites[0].name)}.safetensors"

    def table_file(self, index: int) -> TableFile:
        """The file of embedding ``index``, named after its initializer."""
        name = _slug(self.recipe.embeddings[index].table.weight)
        return TableFile(self.folder / f"embedding.{index:04d}.{name}.safetensors")

    def is_finished(self, index: int) -> bool:
        return self.group_file(index).is_file()

    def is_complete(self) -> bool:
        """Whether every group is finished."""
        return all(self.is_finished(index) for index in range(len(self.recipe.groups)))

    def write(self, index: int, solved: SolvedGroup) -> None:
        """Save one group; the file gets its name when it is whole."""
        tensors: dict[str, Tensor] = {}
        for weight in solved.weights:
            tensors |= _as_tensors(weight)
        specs = {weight.site.name: weight.spec for weight in solved.weights}
        metadata = {
            "specs": _SPECS.dump_json(specs).decode(),
            "reports": _REPORTS.dump_json(solved.reports).decode(),
        }
        try:
            with whole_file(self.group_file(index)) as partial:
                save_file(tensors, partial, metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Quantized weights can't be written to {self.folder} ({error}); free space there, or choose another "
                "place with --weights_path."
            ) from error

    def read_group(self, index: int) -> SolvedGroup:
        """Load one finished group.

        Raises:
            RecipeError: the group's file is missing or damaged.
        """
        group = self.recipe.groups[index]
        weights = tuple(self.read(index, site) for site in group.sites)
        reports = _REPORTS.validate_json(self._metadata(index)["reports"])
        return SolvedGroup(group=group, weights=weights, reports=reports)

    def reports(self) -> list[SiteReport]:
        """The reports of all finished groups, in graph order."""
        found: list[SiteReport] = []
        for index in range(len(self.recipe.groups)):
            if self.is_finished(index):
                found.extend(_REPORTS.validate_json(self._metadata(index)["reports"]))
        return found

    def write_report(self) -> Path:
        """Write report.jsonl, one line a site, from the finished groups."""
        path = self.folder / REPORT
        lines = [TypeAdapter(SiteReport).dump_json(report).decode() for report in self.reports()]
        with whole_file(path) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def read(self, index: int, site: MatMulSite) -> QuantizedWeight:
        """Load one site's weight.

        Raises:
            RecipeError: the group's file is missing or damaged.
        """
        path = self.group_file(index)
        try:
            with safe_open(path, "pt") as file:
                spec = _SPECS.validate_json(file.metadata()["specs"])[site.name]
                names = set(file.keys())
                part = {
                    key: file.get_tensor(f"{site.name}:{key}")
                    for key in ("codes", "scales", "zero_points", "input_scale")
                    if f"{site.name}:{key}" in names
                }
        except (OSError, SafetensorError, KeyError) as error:
            raise RecipeError(
                f"{path} is missing or damaged ({error}); run stages.quantize again to complete it."
            ) from error
        return QuantizedWeight(
            site=site,
            spec=spec,
            codes=part["codes"],
            scales=part["scales"],
            zero_points=part.get("zero_points"),
            input_scale=part.get("input_scale"),
        )

    def _metadata(self, index: int) -> dict[str, str]:
        with safe_open(self.group_file(index), "pt") as file:
            metadata: dict[str, str] = file.metadata()
        return metadata


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", ".", name).strip(".")


def _as_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    parts = {
        "codes": weight.codes,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "input_scale": weight.input_scale,
    }
    # A copy each: safetensors refuses tensors that share storage (siblings share one input scale).
    return {
        f"{weight.site.name}:{key}": tensor.cpu().contiguous().clone()
        for key, tensor in parts.items()
        if tensor is not None
    }


def open_store(folder: Path) -> QuantizedStore:
    """Open the folder of an earlier run.

    Raises:
        RecipeError: there is no readable recipe.json.
    """
    path = folder / RECIPE
    try:
        return QuantizedStore(folder, _RECIPES.validate_json(path.read_bytes()))
    except (OSError, ValidationError) as error:
        raise RecipeError(
            f"{path} can't be read; pass the folder that stages.quantize wrote its weights to."
        ) from error


def create_or_resume_store(folder: Path, recipe: ExportRecipe, *, overwrite: bool) -> QuantizedStore:
    """Start a folder for ``recipe``, or go on with one that has exactly this recipe.

    Raises:
        CacheMismatch: the folder holds another recipe's weights and ``overwrite`` is off.
        UserError: the folder can't be written.
    """
    path = folder / RECIPE
    if path.is_file():
        if path.read_bytes() == _RECIPES.dump_json(recipe, indent=1):
            return QuantizedStore(folder, recipe)
        if not overwrite:
            raise CacheMismatch(
                f"{folder} holds weights of another run ({_summary(path)}); choose another --weights_path or pass "
                "--overwrite to replace them."
            )
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"--weights_path {folder} is not empty and holds no recipe.json; choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_bytes(_RECIPES.dump_json(recipe, indent=1))
    except OSError as error:
        raise UserError(f"--weights_path {folder} can't be written ({error.strerror}); choose another.") from error
    return QuantizedStore(folder, recipe)


def _summary(recipe_file: Path) -> str:
    try:
        return str(json.loads(recipe_file.read_text(encoding="utf-8"))["summary"])
    except (ValueError, KeyError):
        return "unreadable recipe.json"

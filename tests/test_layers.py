"""The direction of imports: every module lies in a room, and imports point to rooms further left."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.syntax import nodes_of

ROOT = Path(__file__).parent.parent
LAYERS: tuple[tuple[str, ...], ...] = (
    ("stages.errors", "stages.records"),
    ("stages.system",),
    ("stages.commands", "stages.model"),
    ("stages.runtime",),
    ("stages.calibration",),
    ("stages.quantization.targets", "stages.quantization.weights"),
    ("stages.quantization.search", "stages.quantization.checkpoints"),
    ("stages.quantization.blocks",),
    ("stages.quantization.plan",),
    ("stages.quantization.preview", "stages.quantization.run"),
    ("export", "stages.evaluation"),
    ("stages.inspect", "stages.report"),
    ("stages.calibrate", "stages.quantize", "stages.chat", "stages.evaluate", "stages.sweep"),
    ("genai_quant", "scripts"),
)
"""Rooms from the ground up; those of one layer may import each other."""
PACKAGES = ("stages", "export", "genai_quant", "scripts")


def room_of(module: str) -> int | None:
    """The layer that ``module`` lies in; None where it lies in none."""
    found = [
        (len(room), layer)
        for layer, rooms in enumerate(LAYERS)
        for room in rooms
        if module == room or module.startswith(room + ".")
    ]
    return max(found)[1] if found else None


def imports_of(source: str) -> Iterator[str]:
    """Every module of ours that ``source`` imports, wherever in it; ``from a import b`` gives a.b too."""
    for node in nodes_of(source):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def faults(module: str, source: str, modules: Iterable[str]) -> Iterator[str]:
    """What is wrong with a module's place and imports, in words."""
    here, known = room_of(module), set(modules)
    if here is None:
        yield f"{module} lies in no room"
        return
    for imported in imports_of(source):
        # A bare package holds a docstring and may be named on the way to a module.
        there = room_of(imported) if imported in known else None
        if there is not None and there > here:
            yield f"{module} imports {imported}, which lies further right"


def sources() -> dict[str, str]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file.read_text(encoding="utf-8") for name, file in named.items()}


def test_every_module_lies_in_a_room_and_imports_point_left() -> None:
    found = sources()
    inner = {name: text for name, text in found.items() if name not in ("stages", "stages.quantization")}
    assert len(inner) > 150
    assert [fault for name, text in inner.items() for fault in faults(name, text, found)] == []


def test_a_wrong_import_is_seen() -> None:
    modules = {"stages.records.sites", "stages.model.load", "stages.report.render", "stages.evaluate"}
    wrong = "def f() -> None:\n    from stages.model import load\n"
    assert list(faults("stages.records.sites", wrong, modules)) == [
        "stages.records.sites imports stages.model.load, which lies further right"
    ]
    assert list(faults("stages.report.render", "import stages.evaluate", modules)) == [
        "stages.report.render imports stages.evaluate, which lies further right"
    ]
    assert list(faults("stages.model.load", "from stages.records.sites import MatMulSite", modules)) == []


def test_a_module_in_no_room_is_seen() -> None:
    assert list(faults("stages.loose", "", ["stages.loose"])) == ["stages.loose lies in no room"]


def test_package_markers_hold_one_docstring() -> None:
    packages = ("stages", "export", "scripts", "genai_quant")
    # The packages themselves also guard the path; genai_quant is what people import.
    markers = [file for package in packages for file in (ROOT / package).rglob("*/__init__.py")]
    assert [file for file in markers if len(ast.parse(file.read_text(encoding="utf-8")).body) != 1] == []
    assert not (ROOT / "stages" / "inspect" / "__init__.py").exists(), "a package of this name hides Python's own"


def test_no_module_that_can_stand_on_the_path_hides_a_standard_one() -> None:
    """``python stages/calibrate.py`` puts its own folder first on the path; deeper modules can't hide anything."""
    top = {path.stem for path in [*ROOT.glob("stages/*.py"), *ROOT.glob("export/*.py"), *ROOT.glob("scripts/*.py")]}
    assert top
    assert not top & (set(sys.stdlib_module_names) - {"__init__", "__main__"})


def test_folders_can_be_taken_in_at_a_glance() -> None:
    """17 entries in stages/ and about a dozen elsewhere; scripts/ holds commands beside its folders."""
    most = {"stages": 17, "scripts": 16}
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    counts = {
        str(folder.relative_to(ROOT)): sum(entry.name != "__pycache__" for entry in folder.iterdir())
        for folder in folders
    }
    assert {name: count for name, count in counts.items() if count > most.get(name, 13)} == {}


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    """Ruff's D401 passes over properties and over nouns."""
    nouns = {"A", "An", "The", "What", "Whether", "How", "Which", "Where", "One", "All", "Its", "This"}
    found = [
        f"{name}.{node.name}"
        for name, text in sources().items()
        for node in nodes_of(text)
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "x").split()[0] in nouns
    ]
    assert found == []

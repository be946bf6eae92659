"""The direction of imports: rooms below never know rooms above."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRIES = {
    "stages.calibrate",
    "stages.evaluate",
    "stages.inspect.__main__",
    "stages.quantize",
    "stages.report_page",
    "stages.sweep",
}
COMPOSERS = {
    "stages.observation",
    "stages.planning",
    "stages.footprint",
    "stages.prepared",
    "stages.preview",
    "stages.search_time",
    "stages.sensitivity",
    "stages.spending",
}
"""Parts of the entry points: they join rooms, and only entry points and each other may import them."""
ROOMS = {
    "stages.block",
    "stages.evaluation",
    "stages.graph",
    "stages.inspection",
    "stages.observe",
    "stages.page",
    "stages.solve",
    "stages.tune",
    "export",
    "genai_quant",
    "scripts",
}
ALLOWED = {
    "stages.block": {"stages.block", "stages.graph"},
    "stages.graph": {"stages.graph"},
    "stages.observe": {"stages.observe"},
    "stages.solve": {"stages.solve"},
    "stages.evaluation": {"stages.evaluation", "stages.observe"},
    "stages.inspection": {
        "stages.evaluation",
        "stages.graph",
        "stages.inspection",
        "stages.observe",
        "export",
    },
    "stages.page": {"stages.page", "stages.evaluation"},
    "export": {"export", "stages.graph"},
    "stages": set(),
    "stages.planning": {"stages.graph", "stages.solve"},
    "stages.footprint": {"stages.observe", "stages.solve"},
    "stages.prepared": {"stages.observe", "stages.solve"},
    "stages.preview": {"stages.graph", "stages.observe", "stages.solve"},
    "stages.search_time": {"stages.solve"},
    "stages.tune": {"stages.tune", "stages.block", "stages.graph", "stages.observe", "stages.solve"},
    "stages.observation": {"stages.graph", "stages.observe"},
    "stages.sensitivity": {"stages.graph", "stages.observe", "stages.solve"},
    "stages.spending": {"stages.graph", "stages.observe", "stages.solve"},
    "stages.calibrate": {"stages.graph", "stages.observe"},
    "stages.inspect.__main__": {"stages.inspection", "stages.observe"},
    "stages.quantize": {
        "stages.block",
        "stages.graph",
        "stages.observe",
        "stages.page",
        "stages.solve",
        "stages.tune",
        "export",
    },
    "stages.evaluate": {"stages.evaluation", "stages.page"},
    "stages.report_page": {"stages.page"},
    "stages.sweep": {"stages.evaluation", "stages.page"},
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _room(module: str) -> str:
    rooms = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return rooms[0] if rooms else ("stages" if module.startswith("stages") else "")


FILES = sorted([*ROOT.glob("stages/**/*.py"), *ROOT.glob("export/**/*.py")])
FACE = sorted(ROOT.glob("genai_quant/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = module if module in ENTRIES | COMPOSERS else _room(module)
    for imported in _imports(path):
        target = _room(imported)
        assert imported not in ENTRIES, f"{module} imports the entry point {imported}"
        assert imported not in COMPOSERS or module in ENTRIES | COMPOSERS, (
            f"{module} imports {imported}, which joins rooms"
        )
        assert target in ALLOWED[here] | {"", "stages"}, f"{module} must not import {imported}"


@pytest.mark.parametrize("path", FACE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_face_stands_on_entry_points(path: Path) -> None:
    """What people import and type composes the stages, returns their records, and knows no scripts."""
    for imported in _imports(path):
        allowed = {"", "stages", "stages.evaluation", "export", "genai_quant"}
        assert _room(imported) in allowed, f"{path.name} must not import {imported}"
        assert imported not in COMPOSERS, f"{path.name} imports {imported}, which joins rooms"


def test_package_markers_hold_one_docstring() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, path


def test_no_module_that_can_stand_on_the_path_hides_a_standard_one() -> None:
    """``python stages/calibrate.py`` puts its own folder first on the path; deeper modules can't hide anything."""
    top = {path.stem for path in [*ROOT.glob("stages/*.py"), *ROOT.glob("export/*.py"), *ROOT.glob("scripts/*.py")]}
    assert top
    assert not top & (set(sys.stdlib_module_names) - {"__init__", "__main__"})

"""The direction of imports: rooms below never know rooms above."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

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
    "stages.footprint": {"stages.solve"},
    "stages.prepared": {"stages.observe", "stages.solve"},
    "stages.preview": {"stages.graph", "stages.observe", "stages.solve"},
    "stages.search_time": {"stages.observe", "stages.solve"},
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


def _wrong_imports(path: Path) -> list[str]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    composes = module in ENTRIES | COMPOSERS
    allowed = ALLOWED[module if composes else _room(module)] | {"", "stages"}
    return [
        f"{module} imports {imported}"
        for imported in sorted(_imports(path))
        if imported in ENTRIES or (imported in COMPOSERS and not composes) or _room(imported) not in allowed
    ]


def test_imports_point_downwards() -> None:
    assert [wrong for path in FILES for wrong in _wrong_imports(path)] == []


def test_the_face_stands_on_entry_points() -> None:
    """What people import and type composes the stages, returns their records, and knows no scripts."""
    allowed = {"", "stages", "stages.evaluation", "export", "genai_quant"}
    wrong = [
        f"{path.name} imports {imported}"
        for path in FACE
        for imported in sorted(_imports(path))
        if _room(imported) not in allowed or imported in COMPOSERS
    ]
    assert wrong == []


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

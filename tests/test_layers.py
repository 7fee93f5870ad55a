"""The layers of the package: which room imports which, read from the sources."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ssnas.runtime.source import _imports

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "errors": set(),
    "config": set(),
    "metrics": set(),
    "runtime": set(),
    "engine": {"runtime"},
    "losses": {"runtime"},
    "decision": {"config", "losses"},
    "data": {"config", "runtime"},
    "networks": {"config", "data", "engine", "runtime"},
    "training": {"config", "data", "engine", "losses", "metrics", "networks", "runtime"},
    "search": {"config", "losses", "networks", "runtime", "training"},
    "finetune": {"config", "data", "losses", "metrics", "networks", "runtime", "training"},
    "model": {"config", "data", "decision", "networks", "runtime"},
    "pipeline": {
        "config",
        "data",
        "decision",
        "engine",
        "finetune",
        "losses",
        "metrics",
        "model",
        "networks",
        "runtime",
        "search",
        "training",
    },
    "report": {"config", "networks"},
    "cli": {"data", "pipeline", "report", "runtime"},
    # Its public names are imported when they are first used.
    "__init__": set(),
}
"""For each room the rooms that it may import, besides `errors`: those on the floors below."""


def modules() -> dict[str, Path]:
    paths = (path.relative_to(ROOT) for path in (ROOT / "ssnas").rglob("*.py"))
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): ROOT / p for p in paths}


def imported(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports, also within its functions."""
    parts = name.split(".")
    package = tuple(parts if path.name == "__init__.py" else parts[:-1])
    names = _imports(ast.parse(path.read_text(encoding="utf-8")), package)
    return {other for other in names if other in modules()} - {name, "ssnas"}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("name", modules())
def test_a_room_imports_the_floors_below(name):
    rooms = {room(other) for other in imported(name, modules()[name])}
    assert rooms <= ALLOWED[room(name)] | {room(name), "errors"}


def test_no_module_leads_back_to_itself():
    graph = {name: imported(name, path) for name, path in modules().items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)


def test_the_rooms_are_few():
    entries = {path.name for path in (ROOT / "ssnas").iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 18
    assert {entry.removesuffix(".py") for entry in entries} - {"py.typed"} == set(ALLOWED)


def test_the_check_sees_an_arrow(tmp_path):
    path = tmp_path / "search.py"
    path.write_text("def late():\n    from ssnas.report import page\n")
    assert imported("ssnas.search", path) == {"ssnas.report", "ssnas.report.page"}

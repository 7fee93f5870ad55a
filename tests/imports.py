"""The project's modules that a stage imports, directly or not, found in the sources."""

import ast
from pathlib import Path


def imported(script: Path, root: Path) -> set[str]:
    """`script` and the modules it imports, relative to `root`; a sub-package is one folder."""
    seen: set[Path] = set()
    todo = [script]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [file for name in _modules(path) for file in _files(name, root)]
    return {str(Path(*path.relative_to(root).parts[:2])) for path in seen}


def _modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith(("ssnas.", "stages."))}


def _files(module: str, root: Path) -> list[Path]:
    base = root.joinpath(*module.split("."))
    return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()]

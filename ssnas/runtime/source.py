"""Digests of what source files compute, for DVC stages and checkpoints.

A comment, a docstring or a blank line changes no result. A digest therefore leaves them out, and
work that has been done stays valid after such a change.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ssnas.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ssnas", "stages")

CPP = (".cpp", ".cc", ".h", ".hpp", ".cu", ".cuh")
NOT_SOURCES = (".md", ".typed", ".pyi", ".pyc", ".so")


def digest(path: Path) -> str:
    """Return the SHA-256 of what a source file computes.

    Of Python this is the syntax tree without docstrings, of C++ the text without comments and with
    white space folded, of any other file its bytes.

    Raises:
        InputError: if a Python file does not parse.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "double.py")
        ...     _ = path.write_text("def double(x): return 2 * x")
        ...     first = digest(path)
        ...     _ = path.write_text('def double(x):\\n    "Twice x."\\n    return 2 * x  # exact')
        ...     second = digest(path)
        ...     _ = path.write_text("def double(x): return 3 * x")
        ...     third = digest(path)
        >>> first == second, first == third
        (True, False)
    """
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _digest(path: Path, modified: int, size: int) -> str:
    if path.suffix == ".py":
        content = "".join(_canonical(_tree(path)))
    elif path.suffix in CPP:
        content = _without_comments(path.read_text(encoding="utf-8"))
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()


def closure(module: str, root: Path = ROOT) -> dict[str, str]:
    """Return the digest of every source that `module` imports, directly or not, by its path.

    Only the project's packages are followed, wherever a file imports them, but under
    `if TYPE_CHECKING:`. Importing a module also runs the `__init__` of its packages. A package's
    other sources, such as C++ in a folder beside its modules, count with the package.

    Args:
        module: such as `stages.search`.
        root: the folder of the packages.

    Raises:
        InputError: if there is no such module, or a file does not parse.

    Example:
        >>> sorted(closure("ssnas.errors"))
        ['ssnas/__init__.py', 'ssnas/errors.py']
    """
    reached: set[Path] = set()
    waiting = _files(module, root)
    if not waiting:
        raise InputError(f"{module}: no module of {' or '.join(PACKAGES)} in {root}")
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        if path.suffix == ".py":
            package = path.relative_to(root).parent.parts
            for name in _imports(_tree(path), package):
                waiting += _files(name, root)
    return {path.relative_to(root).as_posix(): digest(path) for path in sorted(reached)}


def _tree(path: Path) -> ast.Module:
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _parsed(path: Path, modified: int, size: int) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno}: {error.msg}") from error


def _canonical(node: object) -> Iterator[str]:
    """Yield a text of a syntax tree that is the same under every version of Python.

    `ast.dump` is not: since 3.13 it leaves empty fields out. A statement that is a mere string,
    such as a docstring, is left out.
    """
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            # `kind` tells u"a" from "a". Fields that a later version adds are empty.
            if name != "kind" and value != [] and (value is not None or name == "value"):
                yield f"{name}="
                yield from _canonical(value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            if not _is_text(item):
                yield from _canonical(item)
                yield ","
    else:
        yield repr(node)


def _is_text(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the modules that a file of `package` may import, and the names that may be modules."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        name = "." * node.level + (node.module or "")
        base = importlib.util.resolve_name(name, ".".join(package)) if node.level else name
        for alias in node.names:
            yield f"{base}.{alias.name}"
        yield base
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and _type_checking(node.test) and child in node.body:
            continue
        yield from _imports(child, package)


def _type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _files(name: str, root: Path) -> list[Path]:
    """List the files that `import name` reads; none if it is no module of the project."""
    parts = name.split(".")
    module = root.joinpath(*parts)
    package = (module / "__init__.py").is_file()
    if parts[0] not in PACKAGES or not (package or module.with_suffix(".py").is_file()):
        return []
    folders = [root.joinpath(*parts[:count]) for count in range(1, len(parts) + package)]
    files = [] if package else [module.with_suffix(".py")]
    for folder in folders:
        files += [folder / "__init__.py", *_other_sources(folder)]
    return [path for path in files if path.is_file()]


def _other_sources(package: Path) -> Iterator[Path]:
    """Yield a package's sources that are not Python, also in folders that are no packages."""
    for path in package.iterdir():
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir() and not any(path.glob("*.py")):
            yield from _other_sources(path)
        elif path.is_file() and path.suffix not in (".py", *NOT_SOURCES):
            yield path


_LITERAL = r"""R"(?P<mark>[^\s()\\]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\])*"|(?<!\w)'(?:\\.|[^'\\])+'"""
_COMMENT = r"//(?:\\\n|[^\n])*|/\*.*?\*/"
# A directive such as #define ends with its line, so that its line breaks stay.
_DIRECTIVE = r"\s*^[ \t]*#(?:\\\n|[^\n])*\s*"


def _without_comments(text: str) -> str:
    """Return C++ without comments, every run of white space a single blank."""

    def drop(match: re.Match[str]) -> str:
        return " " if match["comment"] else match[0]

    def fold(match: re.Match[str]) -> str:
        if match["directive"]:
            return "\n" + " ".join(match[0].replace("\\\n", " ").split()) + "\n"
        return " " if match[0].isspace() else match[0]

    text = re.sub(f"{_LITERAL}|(?P<comment>{_COMMENT})", drop, text, flags=re.DOTALL)
    spaces = rf"{_LITERAL}|(?P<directive>{_DIRECTIVE})|\s+"
    return re.sub(spaces, fold, text, flags=re.DOTALL | re.MULTILINE).strip()

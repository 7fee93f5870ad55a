"""Digests follow what a source computes, and the closure follows the imports that run."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssnas.errors import InputError
from ssnas.runtime.source import ROOT, closure, digest

PYTHON = '''\
"""Docstring."""

RATE = 0.1


class Loss:
    def __call__(self, x):
        return x * RATE
'''
CPP = """\
#define STEP 4
#define TWICE(x) \\
    (2 * (x))
#include <string>
// The unit.
const char* name = "a // b";
int add(int a, int b) {
  return a + b; /* exact */
}
"""


def digest_of(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return digest(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Docstring."""', '"""Another one,\n\nof three lines."""'),
        ('"""Docstring."""\n', ""),
        ("RATE = 0.1", "RATE = 0.1  # per step"),
        ("RATE = 0.1", 'RATE = 0.1\n"""The rate."""'),
        ("RATE = 0.1", "\n\n\nRATE=0.10"),
        ("return x * RATE", "return (\n            x * RATE\n        )"),
        ("        return", '        "Weigh x."\n        return'),
    ],
)
def test_words_and_layout_of_python_do_not_count(tmp_path, old, new):
    assert old in PYTHON
    first = digest_of(tmp_path, "loss.py", PYTHON)
    assert digest_of(tmp_path, "loss.py", PYTHON.replace(old, new)) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.1", "0.2"),
        ("0.1", "1e-2"),
        ("0.1", '"0.1"'),
        ("x * RATE", "x + RATE"),
        ("x * RATE", "None"),
        ("return x * RATE", "return"),
        ("RATE = 0.1", "RATE = 0.1\nprint('text')"),
        ("Loss", "Losses"),
        ("        return x", "    return x"),
    ],
)
def test_what_python_computes_counts(tmp_path, old, new):
    text = PYTHON.replace(old, new)
    if old.startswith(" "):
        text = PYTHON + "\n    def more(self, x):\n        return x\n"
    assert digest_of(tmp_path, "loss.py", text) != digest_of(tmp_path, "loss.py", PYTHON)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// The unit.", "// Another, with a \" and a '.\n\n"),
        ("/* exact */", "/* on\ntwo lines */"),
        ("/* exact */", ""),
        ("  return a + b;", "\n      return a +\n b;"),
        ("#define STEP 4\n", "\n#define STEP 4 // floats\n\n"),
        ("(2 * (x))", "      (2 * (x))"),
    ],
)
def test_comments_and_layout_of_cpp_do_not_count(tmp_path, old, new):
    assert old in CPP
    first = digest_of(tmp_path, "add.cpp", CPP)
    assert digest_of(tmp_path, "add.cpp", CPP.replace(old, new)) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a + b", "a - b"),
        ('"a // b"', '"a // c"'),
        ('"a // b"', '"a //  b"'),
        ("STEP 4\n", "STEP 4 "),
        ("#define STEP 4\n", ""),
    ],
)
def test_what_cpp_computes_counts(tmp_path, old, new):
    assert old in CPP
    first = digest_of(tmp_path, "add.cpp", CPP)
    assert digest_of(tmp_path, "add.cpp", CPP.replace(old, new)) != first


def test_quotes_in_cpp_do_not_hide_code(tmp_path):
    for text in ("char q = '\"'; int a = 1; // \"", 'auto r = R"x(" )x"; int a = 1; // "'):
        first = digest_of(tmp_path, "q.cpp", text)
        assert digest_of(tmp_path, "q.cpp", text.replace("a = 1", "a = 2")) != first
        assert digest_of(tmp_path, "q.cpp", text.replace('// "', "// '")) == first
    first = digest_of(tmp_path, "n.cpp", "int n = 1'000; // one\nint m = 2'000;")
    assert first == digest_of(tmp_path, "n.cpp", "int n = 1'000; // two\nint m = 2'000;")
    assert first != digest_of(tmp_path, "n.cpp", "int n = 1'000; // one\nint m = 3'000;")


def test_other_text_counts_to_the_byte(tmp_path):
    assert digest_of(tmp_path, "a.css", "p {}") != digest_of(tmp_path, "a.css", "p  {}")


def test_a_file_that_does_not_parse_is_named(tmp_path):
    with pytest.raises(InputError, match=r"loss\.py: line 2: "):
        digest_of(tmp_path, "loss.py", "a = 1\nb = = 2\n")


@pytest.fixture
def project(tmp_path):
    """A small ssnas with every kind of import."""
    files = {
        "stages/__init__.py": "",
        "stages/train.py": "import re\nfrom ssnas import losses\nfrom ssnas.networks.cell import a",
        "ssnas/__init__.py": "",
        "ssnas/losses.py": "from __future__ import annotations\nimport math",
        "ssnas/hints.py": "",
        "ssnas/unused.py": "",
        "ssnas/networks/__init__.py": "from . import space",
        "ssnas/networks/space.py": "",
        "ssnas/networks/cell.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from ssnas.hints import Hint\n"
            "else:\n    import ssnas.other\n"
            "def mixed():\n    from ..engine.cpu import library\n"
        ),
        "ssnas/other.py": "",
        "ssnas/engine/__init__.py": "",
        "ssnas/engine/README.md": "How it works.",
        "ssnas/engine/cpu/__init__.py": "",
        "ssnas/engine/cpu/library.py": "",
        "ssnas/engine/cpu/src/kernels.cpp": "int one = 1;",
        "ssnas/report/__init__.py": "import ssnas.unused",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_closure(project):
    assert list(closure("stages.train", project)) == [
        "ssnas/__init__.py",
        "ssnas/engine/__init__.py",
        "ssnas/engine/cpu/__init__.py",
        "ssnas/engine/cpu/library.py",
        "ssnas/engine/cpu/src/kernels.cpp",
        "ssnas/losses.py",
        "ssnas/networks/__init__.py",
        "ssnas/networks/cell.py",
        "ssnas/networks/space.py",
        "ssnas/other.py",
        "stages/__init__.py",
        "stages/train.py",
    ]
    assert list(closure("ssnas.losses", project)) == ["ssnas/__init__.py", "ssnas/losses.py"]


def test_closure_names_the_file_that_differs(project):
    before = closure("stages.train", project)
    (project / "ssnas" / "losses.py").write_text("import math  # for pi\n")
    assert closure("stages.train", project) != before
    (project / "ssnas" / "losses.py").write_text(
        "from __future__ import annotations\nimport math  # for pi\n"
    )
    assert closure("stages.train", project) == before
    (project / "ssnas" / "engine/cpu/src/kernels.cpp").write_text("int one = 2;")
    after = closure("stages.train", project)
    assert [path for path in after if after[path] != before[path]] == [
        "ssnas/engine/cpu/src/kernels.cpp"
    ]
    (project / "ssnas" / "unused.py").write_text("a = 1")
    (project / "ssnas" / "engine" / "README.md").write_text("Otherwise.")
    assert closure("stages.train", project) == after


@pytest.mark.parametrize("module", ["ssnas.nothing", "json", "stages.train.x"])
def test_closure_of_no_module(project, module):
    with pytest.raises(InputError, match=module):
        closure(module, project)


@pytest.mark.parametrize("module", ["stages.search", "stages.evaluate"])
def test_closure_has_every_module_that_is_loaded(module):
    """Python's own list of loaded modules is the truth that the static walk must cover."""
    code = (
        f"import sys, {module}\n"
        "names = [n for n in sys.modules if n.split('.')[0] in ('ssnas', 'stages')]\n"
        "print(*(sys.modules[n].__file__ for n in names), sep='\\n')"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert {Path(path).relative_to(ROOT).as_posix() for path in loaded} <= set(closure(module))
    assert "ssnas/engine/cpu/src/kernels.cpp" in closure(module)


def test_the_search_depends_on_nothing_that_cannot_change_it():
    sources = set(closure("stages.search"))
    for path in (
        "ssnas/data/folders.py",
        "ssnas/data/listing.py",
        "ssnas/data/sources.py",
        "ssnas/decision.py",
        "ssnas/model.py",
        "ssnas/pipeline/evaluate.py",
        "ssnas/report/page.py",
    ):
        assert path not in sources
    assert "ssnas/data/splits.py" in sources

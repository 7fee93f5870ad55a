"""The package from outside: what an import costs, the public names, what a wheel holds."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssnas

ROOT = Path(ssnas.__file__).parents[1]
HEAVY = {
    "dvc",
    "matplotlib",
    "medmnist",
    "numpy",
    "pandas",
    "PIL",
    "scipy",
    "skimage",
    "sklearn",
    "torch",
    "torchvision",
}
PIPELINE = HEAVY - {"numpy", "torch", "PIL"}


def loaded(statement):
    """The heavy packages that a new process has loaded after this statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return HEAVY & set(done.stdout.split())


def test_an_import_loads_nothing_heavy():
    assert loaded("import ssnas; assert 'Supernet' in dir(ssnas)") == set()
    assert "torch" in loaded("import ssnas; ssnas.Supernet")


def test_the_public_names_need_nothing_of_the_pipeline():
    assert not loaded("from ssnas import Supernet, Model, derive, fit, load") & PIPELINE


def test_public_names_are_those_of_their_modules():
    assert {*ssnas._MODULES, *ssnas._SUBMODULES} == set(ssnas.__all__) - {"__version__"}
    for name, module in ssnas._MODULES.items():
        assert getattr(ssnas, name) is getattr(importlib.import_module(module), name)
        assert name in dir(ssnas)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(ssnas.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == ssnas._MODULES | dict.fromkeys(ssnas._SUBMODULES, "ssnas")


def test_modules_of_functions_need_no_import_of_their_own():
    script = "import ssnas; print(ssnas.losses.__name__, ssnas.decision.posterior.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ssnas.losses posterior\n", done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ssnas' has no attribute 'supernet'"):
        _ = ssnas.supernet
    assert not hasattr(ssnas, "no_such_name")


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in (ROOT / "ssnas").iterdir()}
    assert not modules & set(ssnas._MODULES)


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools", "77")
    # From a copy: a build leaves folders behind.
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    names = [name for name in listed.stdout.split("\0") if name.startswith("ssnas/")]
    for name in [*names, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "stages").mkdir()
    (source / "stages" / "__init__.py").touch()
    script = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "wheels").iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == set(names)
    assert f"-{ssnas.__version__}-" in wheel.name


def test_the_version_stands_in_one_place():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ssnas.__version__"}

"""Building, keeping and loading kernels: odd compilers, damaged files, no place to keep them."""

import ast
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssnas.engine.cpu import library as kernels

compiled = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
REAL_SOURCE = kernels.SOURCE
TINY = 'extern "C" void run() {}\nextern "C" int answer() { return 42; }\n'
"""A library that compiles at once."""


@pytest.fixture
def fresh():
    """`library` as in a new process, before and after."""
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.fixture
def source(fresh, monkeypatch, tmp_path):
    """The source of a tiny library, for caches and temporary folders of this test alone."""
    path = tmp_path / "kernels.cpp"
    path.write_text(TINY)
    monkeypatch.setattr(kernels, "SOURCE", path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(temporary))
    return path


@pytest.fixture
def program(tmp_path):
    """Writes a shell script, which has its arguments in $@, and gives its path."""

    def write(script, name="c++"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def load():
    """The path of the library that a new process loads, or None."""
    kernels.library.cache_clear()
    library = kernels.library()
    if library is None:
        return None
    assert library.answer() == 42
    return Path(library._name)


def kept(folder):
    return sorted(folder.glob("kernels-*"))


# Keeping


@compiled
def test_built_once(source, monkeypatch, tmp_path):
    built = load()
    assert [built] == list((tmp_path / "cache" / "ssnas").iterdir())
    assert kernels.library() is kernels.library()
    monkeypatch.setattr(kernels, "_build", None)
    assert load() == built


@compiled
def test_a_changed_source_is_built_anew(source):
    first = load()
    source.write_text(TINY + "// another\n")
    assert load() != first


@compiled
def test_threads_that_build_at_once_leave_one_library(source, in_threads, tmp_path):
    names = []

    def work(_value):
        names.append(kernels.library.__wrapped__()._name)

    in_threads(work)
    assert len(names) == 4
    assert {Path(name) for name in names} == set((tmp_path / "cache" / "ssnas").iterdir())


DAMAGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 3],
    "overwritten": lambda content: content[:1000] + bytes(2000) + content[3000:],
}


@compiled
def test_a_damaged_library_is_rebuilt_before_it_is_loaded(source, tmp_path):
    """In a new process: to load a file that was cut off may end the one that does."""
    whole, sources = {}, []
    for damage, damaged in DAMAGES.items():
        source.write_text(f"{TINY}// {damage}\n")
        path = load()
        whole[path] = path.read_bytes()
        # This process has mapped the old file, so the damaged one is a file of its own.
        path.unlink()
        path.write_bytes(damaged(whole[path]))
        # A library has its source's name, but not the folder's.
        sources.append(tmp_path / damage / source.name)
        sources[-1].parent.mkdir()
        sources[-1].write_text(source.read_text())
    script = (
        "import sys; from pathlib import Path; from ssnas.engine.cpu import library as kernels\n"
        "for path in sys.argv[1:]:\n"
        "    kernels.library.cache_clear(); kernels.SOURCE = Path(path)\n"
        "    assert kernels.library().answer() == 42"
    )
    subprocess.run([sys.executable, "-c", script, *map(str, sources)], check=True)
    assert {path: path.read_bytes() for path in whole} == whole


# Compilers


@compiled
def test_the_compiler_may_have_arguments(source, monkeypatch, program, tmp_path):
    log = tmp_path / "log"
    wrapper = program(f'echo "$@" >> {log}; exec "$@"', "wrapper with space")
    monkeypatch.setenv("CXX", f"'{wrapper}' g++ -DONE=1")
    first = load()
    lines = log.read_text().splitlines()
    assert lines and all(line.startswith("g++ -DONE=1 ") for line in lines)
    monkeypatch.setenv("CXX", f"'{wrapper}' g++ -DONE=2")
    assert load().name != first.name


@compiled
def test_another_version_behind_a_wrapper_builds_anew(source, monkeypatch, program, tmp_path):
    version = tmp_path / "version"
    script = f'shift; [ "$1" = --version ] && exec cat {version}; exec g++ "$@"'
    monkeypatch.setenv("CXX", f"{program(script)} g++")
    names = set()
    for text in ("1.0", "2.0"):
        version.write_text(text)
        names.add(load().name)
    assert len(names) == 2


@compiled
@pytest.mark.parametrize(
    ("refused", "used"),
    [
        ("-fopenmp", {"-march=native"}),
        ("-march=native", {"-mcpu=native", "-fopenmp"}),
        ("-m*=native", {"-fopenmp"}),
        ("-m*=native|-fopenmp", set()),
    ],
)
def test_flags_that_the_compiler_lacks_are_left_out(
    source, monkeypatch, program, tmp_path, refused, used
):
    log = tmp_path / "log"
    script = (
        f'for flag in "$@"; do case $flag in {refused}) echo "error: no $flag" >&2; exit 1;; esac; '
        f'done\necho "$@" >> {log}; exec g++ "$@"'
    )
    monkeypatch.setenv("CXX", str(program(script)))
    assert load() is not None
    last = set(log.read_text().splitlines()[-1].split())
    assert last & {*kernels.PROCESSOR_FLAGS, "-fopenmp"} == used
    assert str(source) in last


@pytest.mark.parametrize("cxx", ["no-such-compiler --fast", "'g++"])
def test_a_compiler_that_is_none(source, monkeypatch, caplog, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert load() is None
    assert len(caplog.records) == 1
    assert ("there is no no-such-compiler" in caplog.text) is (cxx != "'g++")


def test_without_a_name_clang_stands_in_for_gcc(source, monkeypatch, program):
    monkeypatch.delenv("CXX", raising=False)
    clang = program("exit 0", "clang++")
    monkeypatch.setenv("PATH", str(clang.parent))
    assert kernels._compiler() == [str(clang)]
    clang.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no g\+\+ or clang\+\+"):
        kernels._compiler()


@pytest.mark.parametrize(
    "messages",
    [
        ["In file included from x:", "x:1: warning: odd", "x:2: error: THIS", "x:3: error: more"],
        ["x:2:10: fatal error: THIS", "compilation terminated."],
        ["ld: warning: odd", "ld: final link failed: THIS", "collect2: error: ld returned 1"],
        ["ld: cannot find THIS", "clang: error: linker command failed with exit code 1"],
        ["THIS", "and more"],
    ],
)
def test_a_compiler_that_fails_is_said_once_by_its_first_error(
    source, monkeypatch, program, tmp_path, caplog, messages
):
    (tmp_path / "messages").write_text("\n".join(messages))
    script = f"[ $1 = --version ] && exit 0\ncat {tmp_path}/messages >&2; exit 1"
    monkeypatch.setenv("CXX", str(program(script)))
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
        assert kernels.library() is None
    (record,) = caplog.records
    (cause,) = [message for message in messages if "THIS" in message]
    assert f"({cause})" in record.getMessage()


@compiled
@pytest.mark.parametrize(
    "result",
    [
        ': > "$out"',
        "true",
        'echo "int f() { return 0; }" | g++ -x c++ -shared -fPIC - -o "$out"',
    ],
    ids=["empty", "none", "no kernels"],
)
def test_what_is_no_library_of_kernels_is_not_kept(
    source, monkeypatch, program, caplog, tmp_path, result
):
    script = f'[ $1 = --version ] && exit 0\nfor out in "$@"; do :; done\n{result}'
    monkeypatch.setenv("CXX", str(program(script)))
    assert load() is None
    assert len(caplog.records) == 1
    assert not list(tmp_path.rglob("kernels-*"))


# Places


def private_folder(tmp_path):
    return tmp_path / "temporary" / f"ssnas-{os.getuid()}"


@compiled
def test_no_home_directory(source, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def no_entry(_uid):
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    folder = private_folder(tmp_path)
    assert load().parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(caplog.records) == 1
    assert "there is no home directory" in caplog.text
    # What is kept there is found without another word.
    caplog.clear()
    monkeypatch.setattr(kernels, "_build", None)
    assert load().parent == folder
    assert not caplog.records


@compiled
def test_a_cache_that_cannot_be_written_to(source, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    assert load().parent == private_folder(tmp_path)
    assert len(caplog.records) == 1
    assert "Not a directory: '/dev/null/x/ssnas'" in caplog.text


@compiled
def test_a_cache_that_is_full(source, monkeypatch, program, caplog, tmp_path):
    """The compiler is the one to notice."""
    script = (
        f'case "$*" in *{tmp_path}/cache/*) echo "fatal error: No space left on device" >&2; '
        'exit 1;; esac; exec g++ "$@"'
    )
    monkeypatch.setenv("CXX", str(program(script)))
    assert load().parent == private_folder(tmp_path)
    assert "No space left on device" in caplog.text


@compiled
def test_a_relative_cache_home_is_no_cache_home(source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load().parent == tmp_path / "home" / ".cache" / "ssnas"


@compiled
@pytest.mark.parametrize("kind", ["open to all", "a link", "a file"])
def test_nothing_is_loaded_from_where_others_may_write(source, monkeypatch, caplog, tmp_path, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    folder = private_folder(tmp_path)
    if kind == "a file":
        folder.write_text("")
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert load() is None
    (record,) = caplog.records
    assert "/dev/null/x" in record.getMessage() and str(folder) in record.getMessage()


# The kernels themselves


@compiled
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_one_openmp_runtime():
    """A second one's threads would fight with PyTorch's for the cores."""
    script = (
        "from ssnas.engine.cpu import library as kernels; assert kernels.library()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert len(ast.literal_eval(done.stdout)) == 1


GRADIENTS = """
import os, sys, torch
from ssnas.engine.cpu import library as kernels
from ssnas.networks.supernet import PlainSupernet, Supernet

assert (kernels.library() is not None) == (os.environ.get("SSNAS_NATIVE") != "0")
torch.set_num_threads(1)
torch.manual_seed(0)
nets = [net(4, 3, stem_multiplier=1, num_classes=3).double() for net in (PlainSupernet, Supernet)]
nets[1].load_state_dict(nets[0].state_dict())
x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
results = []
for net in nets:
    tasks = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
    y = net(x)
    y.square().sum().backward()
    if tasks:
        assert len(os.listdir("/proc/self/task")) == tasks, "further threads"
    results.append([y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
plain, fast = results
assert len(plain) == len(fast) > 50
for expected, actual in zip(plain, fast):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
torch.save(fast, sys.argv[1])
"""


@pytest.mark.slow
@compiled
def test_kernels_by_clang_compute_the_same(program, tmp_path, monkeypatch):
    """With OpenMP and without: Apple's clang has none."""
    compiler = kernels.shutil.which("clang++")
    if compiler is None:
        pytest.skip("no clang++")
    script = (
        'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac\n'
        f'exec {compiler} "$@"'
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = []
    for number, cxx in enumerate([compiler, program(script)]):
        monkeypatch.setenv("CXX", str(cxx))
        path = tmp_path / f"{number}.pt"
        subprocess.run([sys.executable, "-c", GRADIENTS, str(path)], check=True)
        results.append(torch.load(path))
    assert len(kept(tmp_path / "ssnas")) == 2
    for with_openmp, without in zip(*results, strict=True):
        assert torch.equal(with_openmp, without)

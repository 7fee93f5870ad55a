"""Disks that are full or read-only: one line that names the file, and the next run heals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssnas.config.load import load_main
from ssnas.errors import InputError
from ssnas.pipeline.fit import fit
from ssnas.runtime.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = {
    "make-longtail": ["data/main", "metrics/main"],
    "search": ["artifacts/main/search", ".checkpoints/main/search", "metrics/main/lineage"],
    "derive-genotype": ["metrics/main/lineage"],
    "finetune": ["artifacts/main/finetune", ".checkpoints/main/finetune", "metrics/main/lineage"],
    "evaluate": ["metrics/main/lineage"],
    "export": ["artifacts/main/export"],
}


def block(folder):
    """Put a file where a folder has to be: the system refuses whoever it is, also root."""
    aside = folder.with_name(folder.name + " aside")
    if folder.exists():
        shutil.move(folder, aside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.touch()

    def unblock():
        folder.unlink()
        if aside.exists():
            shutil.move(aside, folder)

    return unblock


@pytest.mark.parametrize(
    ("stage", "place"), [(stage, place) for stage, places in OUTPUTS.items() for place in places]
)
def test_a_place_that_cannot_be_written_is_named_and_the_next_run_heals(finished, stage, place):
    unblock = block(Path(place))
    code, lines = finished.run(stage)
    assert code == 1 and len(lines) == 1, lines
    assert place in lines[0]
    unblock()
    assert not list(Path().rglob("*.partial"))
    code, lines = finished.run(stage)
    assert (code, lines) == (0, [])


FULL = """
import resource, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import runpy
sys.argv = ["stage"]
runpy.run_module("stages.{stage}", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 100, 2000])
@pytest.mark.parametrize("stage", ["make_longtail", "search", "finetune", "export"])
def test_a_full_disk(finished, stage, limit):
    """By a limit on the size of files: what does not fit is refused as on a full disk."""
    pytest.importorskip("resource")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    script = FULL.format(root=str(ROOT), limit=limit, stage=stage)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1, done.stderr[-2000:]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert any(part in errors[0] for part in ("main", ".checkpoints"))
    assert not list(Path().rglob("*.partial"))
    for path, content in before.items():
        if path.suffix in (".npz", ".safetensors", ".ssnas", ".onnx"):
            whole = path.read_bytes()
            assert whole == content or len(whole) <= limit
    code, lines = finished.run(stage.replace("_", "-"))
    assert (code, lines) == (0, [])


def test_an_error_of_the_system_while_writing_is_a_line(tmp_path):
    with pytest.raises(InputError, match=r"a/b: cannot be written \(File exists: .*a\)"):
        (tmp_path / "a").touch()
        with written_whole(tmp_path / "a" / "b"):
            pass


def test_fit_names_a_folder_that_cannot_be_written(project):
    Path("out").touch()
    with pytest.raises(InputError, match="out"):
        fit("good.npz", out="out", device="cpu")


def test_an_artifact_that_cannot_be_read_is_named(finished):
    """As another user's file is, or one on a disk that fails."""
    path = Path("data/main/splits.npz")
    path.unlink()
    path.mkdir()
    code, lines = finished.run("search")
    assert code == 1 and len(lines) == 1 and "splits.npz" in lines[0]
    assert load_main().scale == "small"

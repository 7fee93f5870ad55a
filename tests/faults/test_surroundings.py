"""Systems that lack what Linux has, and runs that are under way."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssnas.runtime.device import peak_memory_mb
from ssnas.training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
sys.path.insert(0, {root!r})
sys.modules["fcntl"] = sys.modules["resource"] = None
import ssnas.cli, stages.cli, ssnas.pipeline.fit, ssnas.report.write
from pathlib import Path
from ssnas.training.checkpoint import Checkpoint
with Checkpoint(Path("c"), {{}}) as checkpoint:
    checkpoint.save({{"epoch": 1}})
    print(checkpoint.load())
"""


def test_without_the_modules_that_windows_lacks(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(root=str(ROOT))], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "{'epoch': 1}", done.stderr
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb(__import__("torch").device("cpu")) is None


def test_two_runs_of_one_work(project):
    """The second one is refused, and the first one goes on."""
    assert project.run("make-longtail")[0] == 0
    with Checkpoint(Path(".checkpoints/main/search/0"), {}):
        code, lines = project.run("search")
    assert code == 1 and len(lines) == 1
    assert "another process" in lines[0] and ".checkpoints/main/search" in lines[0]
    assert project.run("search") == (0, [])


@pytest.mark.parametrize("name", ["evaluate.json", "per_class.csv", "finetune.json", "data.json"])
def test_a_summary_while_a_run_is_under_way(finished, name, capsys):
    """DVC removes the outputs of a stage before it runs it."""
    from ssnas.errors import InputError
    from ssnas.report.summary import summary

    assert "balanced accuracy" in summary(Path("metrics/main"))
    Path("metrics/main", name).unlink()
    with pytest.raises(InputError) as error:
        summary(Path("metrics/main"))
    assert name in str(error.value) and "under way" in str(error.value)
    assert "dvc repro" in str(error.value)

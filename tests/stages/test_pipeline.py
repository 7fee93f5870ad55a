"""The stages as their users run them: commands, errors, interruptions, DVC."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.imports import imported

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "make-longtail": "make_longtail",
    "search": "search",
    "derive-genotype": "derive_genotype",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "transfer": "transfer",
    "report": "report",
}
CHAIN = list(STAGES)
STAGES |= {
    "finetune-baseline": "finetune",
    "evaluate-baseline": "evaluate",
    "crossvalidate": "transfer",
    "tables": "tables",
    "figures": "figures",
}
TINY = {
    "data": {"largest_class": 20},
    "search": {"channels": 4, "epochs": 2, "batch_size": 16, "projector": 16, "knn_every": 1},
    "finetune": {"epochs": 2},
    "transfer": {"epochs": 1, "folds": 2},
}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@example.org",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@example.org",
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", f"stages.{name}", *arguments], folder)


def edit(folder: Path, **changes) -> None:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project in a folder with a space in its name, with a scale of a few seconds."""
    folder = tmp_path / "my project"
    folder.mkdir()
    for name in ("ssnas", "stages", "papers", ".dvc", "metrics"):
        if name != "metrics":
            shutil.copytree(
                ROOT / name,
                folder / name,
                ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local"),
            )
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "data" / "raw" / ".gitkeep").touch()
    scales = yaml.safe_load((folder / "params.yaml").read_text())["scales"]
    edit(folder, scales=scales | {"small": TINY})
    return folder


def test_every_stage_depends_on_what_it_imports():
    for path in ("dvc.yaml", "papers/dvc.yaml"):
        document = yaml.safe_load((ROOT / path).read_text())
        for name, entry in document["stages"].items():
            deps = entry.get("do", entry)["deps"]
            listed = {dep for dep in deps if dep.startswith(("ssnas", "stages"))}
            assert listed == imported(ROOT / "stages" / f"{STAGES[name]}.py", ROOT), (path, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1}, ["params.yaml", "lr", "unknown key", "dataset"]),
        ({"data": {"imbalance": 0.5}}, ["data.imbalance", "0.5", "at least 1"]),
        ({"search": {"epoch": 3}}, ["search.epoch", "unknown key", "epochs"]),
        ({"loss": "hinge"}, ["loss", "hinge", "focal+la"]),
        ({"dataset": "mnits"}, ["mnits", "digits", "medmnist"]),
        ({"dataset": "data/raw/mine"}, ["data/raw/mine"]),
        ({"scale": "huge"}, ["scale", "huge", "small", "paper"]),
        ({"device": "cuda:7"}, ["device", "cuda:7"]),
    ],
)
def test_a_wrong_parameter_is_one_line_that_says_what_to_do(project, change, words):
    edit(project, **change)
    name = "search" if "device" in change else "make_longtail"
    result = stage(name, project)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert not (project / "metrics").exists()
    assert not (project / "artifacts").exists()


@pytest.mark.slow
def test_a_stage_without_its_input_names_the_command(project):
    result = stage("finetune", project)
    assert result.returncode == 1
    assert "dvc repro" in result.stderr


@pytest.mark.slow
def test_an_artifact_of_other_parameters_is_refused(project):
    for name in ("make_longtail", "search"):
        assert stage(name, project).returncode == 0
    edit(project, seed=1)
    result = stage("derive_genotype", project)
    assert result.returncode == 1
    assert "seed" in result.stderr
    assert "dvc repro" in result.stderr


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(project):
    """SIGKILL in the search, twice, and in the fine-tuning: weights and figures are bit-equal."""
    edit(project, scales={"small": TINY | {"search": TINY["search"] | {"epochs": 6}}, "paper": {}})
    other = project.with_name("uninterrupted")
    shutil.copytree(project, other)
    assert stage("make_longtail", project).returncode == 0
    shutil.copytree(project / "data", other / "data", dirs_exist_ok=True)
    folder = project / ".checkpoints" / "main"
    resumed = ""
    for name, kills in (("search", 2), ("finetune", 1)):
        for _ in range(kills):
            kill_once_saved(name, project, folder / name / "0" / "last.pt")
        result = stage(name, project)
        assert result.returncode == 0, result.stderr
        resumed += result.stderr
        if name == "search":
            assert stage("derive_genotype", project).returncode == 0
    for name in ("search", "derive_genotype", "finetune"):
        assert stage(name, other).returncode == 0
    assert resumed.count("going on after epoch") >= 2
    for name in ("search/supernet.safetensors", "finetune/network.safetensors"):
        path = Path("artifacts", "main", name)
        assert (project / path).read_bytes() == (other / path).read_bytes(), name
    for name in ("alpha.csv", "genotype.json", "finetune.json"):
        path = Path("metrics", "main", name)
        assert (project / path).read_text() == (other / path).read_text(), name
    assert not list(folder.rglob("*.pt"))


def kill_once_saved(name: str, folder: Path, checkpoint: Path) -> None:
    """Start a stage and kill it as soon as it has written a new checkpoint."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"], cwd=folder, env=ENVIRONMENT, stderr=-3
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.mark.slow
def test_dvc_runs_what_changed_and_nothing_else(project):
    """repro, a no-op, an experiment with another loss, metrics and params diff."""
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "0"]):
        assert run(command, project).returncode == 0
    first = run(["dvc", "repro"], project)
    assert first.returncode == 0, first.stderr[-3000:]
    assert sorted(ran(first.stdout)) == sorted(CHAIN)
    run(["git", "add", "-A"], project)
    run(["git", "commit", "-qm", "run"], project)
    assert not ran(run(["dvc", "repro"], project).stdout)

    genotype = (project / "metrics/main/genotype.json").read_text()
    experiment = run(["dvc", "exp", "run", "-S", "loss=focal"], project)
    assert experiment.returncode == 0, experiment.stderr[-3000:]
    assert sorted(ran(experiment.stdout)) == ["evaluate", "finetune", "report", "transfer"]
    assert (project / "metrics/main/genotype.json").read_text() == genotype
    assert json.loads((project / "metrics/main/finetune.json").read_text())["loss"] == "focal"
    assert "balanced_accuracy" in run(["dvc", "metrics", "diff", "--all"], project).stdout
    assert "focal" in run(["dvc", "params", "diff"], project).stdout

    dry = run(["dvc", "repro", "--dry"], project).stdout
    assert not ran(dry)
    with (project / "ssnas" / "genotype.py").open("a") as file:
        file.write("\n# changed\n")
    assert ran(run(["dvc", "repro", "--dry"], project).stdout)[:2] == ["make-longtail", "search"]


@pytest.mark.slow
def test_one_bad_row_does_not_stop_the_others(project):
    """`dvc repro --keep-going` makes the good data set and says which row failed, and why."""
    entries = {
        f"small-{name}": {"name": name, "system": name, "scale": "small", "dataset": dataset}
        for name, dataset in (("bad", "data/raw/nothing"), ("good", "digits"))
    }
    kinds = ("searches", "rows", "baselines", "transfers", "crossvalidations")
    rows = {"datasets": entries} | {kind: {} for kind in kinds}
    (project / "papers" / "rows.yaml").write_text(yaml.safe_dump(rows))
    assert run(["git", "init", "-q"], project).returncode == 0
    command = ["dvc", "repro", "--keep-going", "--glob", "papers/dvc.yaml:make-longtail@small-*"]
    result = run(command, project)
    assert result.returncode != 0
    assert "small-bad" in result.stderr
    assert "data/raw/nothing" in result.stderr
    made = project / "data" / "papers" / "small" / "datasets"
    assert (made / "good" / "splits.npz").exists()
    assert not (made / "bad" / "splits.npz").exists()

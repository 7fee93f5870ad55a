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

import numpy as np
import pytest
import yaml

import ssnas

ROOT = Path(__file__).resolve().parents[2]
CHAIN = (
    "inputs",
    "make-longtail",
    "search",
    "derive-genotype",
    "finetune",
    "evaluate",
    "transfer",
    "export",
    "report",
)
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
    for name in ("ssnas", "stages", "papers", ".dvc"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns(
                "__pycache__", "cache", "tmp", "config.local", "dvc.lock", "metrics", "inputs"
            ),
        )
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "data" / "raw" / ".gitkeep").touch()
    scales = yaml.safe_load((folder / "params.yaml").read_text())["scales"]
    edit(folder, recipe="published", scales=scales | {"small": TINY})
    return folder


@pytest.mark.parametrize("path", ["dvc.yaml", "papers/dvc.yaml"])
def test_every_stage_depends_on_the_digests_of_its_script(path):
    stages = yaml.safe_load((ROOT / path).read_text())["stages"]
    digested = stages.pop("inputs")["cmd"].split()
    for name, entry in stages.items():
        body = entry.get("do", entry)
        script = re.search(r"python -m stages\.(\w+)", body["cmd"])[1].replace("_", "-")
        code = [Path(dep) for dep in body["deps"] if "inputs/code" in dep]
        assert [file.stem for file in code] == [script], name
        assert script in digested


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
    for name in ("data", "metrics"):
        shutil.copytree(project / name, other / name, dirs_exist_ok=True)
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
    after_the_search = ["evaluate", "export", "finetune", "report", "transfer"]
    assert sorted(ran(experiment.stdout)) == after_the_search
    assert (project / "metrics/main/genotype.json").read_text() == genotype
    assert json.loads((project / "metrics/main/finetune.json").read_text())["loss"] == "focal"
    assert "balanced_accuracy" in run(["dvc", "metrics", "diff", "--all"], project).stdout
    assert "focal" in run(["dvc", "params", "diff"], project).stdout

    assert not ran(run(["dvc", "repro", "--dry"], project).stdout)


def changed(project: Path) -> list[str]:
    """The stages that `dvc status` calls changed, after the digests are made anew."""
    assert run(["dvc", "repro", "-q", "inputs"], project).returncode == 0
    return re.findall(r"^([\w-]+):$", run(["dvc", "status"], project).stdout, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_change_re_runs_what_it_can_change(project):
    """By `dvc status`: docstrings, comments, the report, other images, and a loss."""
    source, edited = project / "ssnas" / "losses.py", project / "data" / "raw" / "other.npz"
    assert run(["git", "init", "-q"], project).returncode == 0
    assert run(["dvc", "repro"], project).returncode == 0
    assert not changed(project)

    text = source.read_text()
    source.write_text(text.replace('"""', '"""Once more. ', 1) + "\n# A comment.\n")
    edited.write_bytes(b"images of another data set")
    assert not changed(project)

    pictures = project / "ssnas" / "report" / "pictures.py"
    pictures.write_text(pictures.read_text() + "\nDPI = 1\n")
    assert changed(project) == ["report"]

    decision = project / "ssnas" / "decision.py"
    decision.write_text(decision.read_text() + "\nFOLDS = 2\n")
    assert changed(project) == ["evaluate", "transfer", "export", "report"]

    source.write_text(text + "\nSCALE = 2\n")
    stages = ["search", "finetune", "evaluate", "transfer", "export", "report"]
    assert changed(project) == stages


@pytest.mark.slow
def test_another_decision_trains_nothing_again(project):
    assert run(["git", "init", "-q"], project).returncode == 0
    assert run(["dvc", "repro"], project).returncode == 0
    edit(project, decide="natural")
    assert changed(project) == ["evaluate", "transfer", "export"]
    assert run(["dvc", "repro"], project).returncode == 0
    figures = json.loads((project / "metrics/main/evaluate.json").read_text())
    assert figures["decide"] == "natural"
    assert figures["error_rate"] == figures["decisions"]["natural"]["error_rate"]


@pytest.mark.slow
def test_the_model_is_a_dvc_artifact(project):
    """A tag registers a version; `dvc artifacts get` brings it elsewhere, and it loads there."""
    for command in (["git", "init", "-q"], ["dvc", "repro"], ["git", "add", "-A"]):
        assert run(command, project).returncode == 0
    for command in (["git", "commit", "-qm", "0"], ["git", "tag", "classifier@v0.1.0", "-m", "0"]):
        assert run(command, project).returncode == 0
    elsewhere = project.with_name("elsewhere")
    elsewhere.mkdir()
    result = run(["dvc", "artifacts", "get", str(project), "classifier"], elsewhere)
    assert result.returncode == 0, result.stderr
    assert ssnas.load(elsewhere / "model.ssnas").class_names == tuple(map(str, range(10)))


@pytest.mark.slow
def test_edited_images_of_the_run_are_noticed(project):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (90, 8, 8), dtype=np.uint8), np.arange(90) % 3
    path = project / "data" / "raw" / "mine.npz"
    np.savez(path, train_images=images, train_labels=labels)
    edit(project, dataset="data/raw/mine.npz")
    assert run(["git", "init", "-q"], project).returncode == 0
    assert run(["dvc", "repro", "make-longtail"], project).returncode == 0
    assert "make-longtail" not in changed(project)
    np.savez(path, train_images=images[::-1], train_labels=labels)
    assert "make-longtail" in changed(project)


@pytest.mark.slow
def test_a_transfer_runs_when_it_is_asked_for(project):
    for name in ("make_longtail", "search", "derive_genotype", "finetune"):
        assert stage(name, project).returncode == 0
    path = project / "metrics" / "main" / "transfer.json"
    result = stage("transfer", project)
    assert "no transfer" in result.stdout
    assert json.loads(path.read_text()) == {}
    edit(project, transfer={"dataset": "faces"})
    assert stage("transfer", project).returncode == 0
    assert json.loads(path.read_text())["dataset"] == "faces"


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
    command = ["dvc", "repro", "--keep-going", "--glob", "make-longtail@small-*"]
    result = run(command, project / "papers")
    assert result.returncode != 0
    assert "small-bad" in result.stderr
    assert "data/raw/nothing" in result.stderr
    made = project / "papers" / "data" / "small" / "datasets"
    assert (made / "good" / "splits.npz").exists()
    assert not (made / "bad" / "splits.npz").exists()

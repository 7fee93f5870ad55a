"""A project to break: a folder with params.yaml, and stages that run in this process."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from ssnas.config.load import load_main, load_row
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.evaluate import evaluate
from ssnas.pipeline.export import export
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.search import run_search
from ssnas.pipeline.transfer import transfer
from ssnas.runtime.command import command

STAGES = {
    "make-longtail": make_longtail,
    "search": run_search,
    "derive-genotype": derive_genotype,
    "finetune": finetune,
    "evaluate": evaluate,
    "transfer": transfer,
    "export": export,
}
TINY = {
    "search": {"channels": 4, "epochs": 1, "batch_size": 8, "projector": 8, "knn_every": 0},
    "finetune": {"epochs": 1, "batch_size": 8},
    "transfer": {"epochs": 1, "folds": 2},
}
PARAMS = {
    "dataset": "good.npz",
    "data": {"profile": "natural"},
    "scales": {"small": TINY},
    "device": "cpu",
}


def arrays(n=60, classes=3, side=8):
    """Images of noise whose brightness is their class."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    images = rng.integers(0, 60, (n, side, side)) + 60 * labels[:, None, None]
    return {"train_images": images.astype(np.uint8), "train_labels": labels}


class Project:
    """The folder, and what a command in it leaves: its status, its message, its files."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def params(self, **changes):
        text = yaml.safe_dump(PARAMS | changes)
        (self.folder / "params.yaml").write_text(text, encoding="utf-8")

    def run(self, stage, kind=None, key=None):
        """Run a stage as its script does; returns the status and the lines on the error stream."""
        self.capsys.readouterr()
        code = 0
        try:
            with command(status=1):
                STAGES[stage](load_main() if kind is None else load_row(kind, key))
        except SystemExit as error:
            code = error.code
        lines = self.capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith("error")]

    def refused(self, stage, *words, kind=None, key=None):
        """Check that a stage ends with status 1 and one line that has these words."""
        code, lines = self.run(stage, kind, key)
        assert code == 1, (code, lines)
        assert len(lines) == 1, lines
        for word in words:
            assert word in lines[0], (word, lines[0])
        assert len(lines[0]) < 600
        assert not self.made()
        return lines[0]

    def made(self):
        """List what stages write: whole or partial."""
        places = ("artifacts", "metrics", "data")
        files = (path for place in places for path in (self.folder / place).rglob("*"))
        return sorted(str(path.relative_to(self.folder)) for path in files if path.is_file())


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    np.savez(folder / "good.npz", **arrays())
    made = Project(folder, capsys)
    made.params()
    return made


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    """A folder in which the stages up to evaluate have run."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "good.npz", **arrays())
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("make-longtail", "search", "derive-genotype", "finetune", "evaluate"):
            STAGES[name](load_main())
    return folder


@pytest.fixture
def finished(finished_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project"
    shutil.copytree(finished_folder, folder)
    monkeypatch.chdir(folder)
    return Project(Path(folder), capsys)

"""SIGKILL at random moments, other ones for each commit: the run ends bit for bit as without."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
CHAIN = """
import sys
sys.path.insert(0, {root!r})
from ssnas.pipeline.fit import fit
import ssnas.training.trainer as trainer
trainer.SAVE_SECONDS = 0.2
fit("good.npz", out="out", device="cpu",
    search={{"channels": 4, "epochs": 6, "batch_size": 4, "projector": 8, "knn_every": 2}},
    finetune={{"epochs": 12, "batch_size": 8}})
"""
COMPARED = (
    "artifacts/search/supernet.safetensors",
    "artifacts/finetune/network.safetensors",
    "data/splits.npz",
    "metrics/genotype.json",
    "metrics/evaluate.json",
    "model.ssnas",
)


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "no commit"


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", CHAIN.format(root=str(ROOT))], cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_it_ends_the_same(project):
    folder = project.folder
    killed = folder.with_name("killed")
    shutil.copytree(folder, killed)
    began = time.monotonic()
    process = start(folder)
    assert process.wait() == 0, process.stderr.read()[-2000:]
    whole = time.monotonic() - began

    seed = commit()
    moments = random.Random(seed)
    for _ in range(KILLS):
        process = start(killed)
        time.sleep(moments.uniform(0.3, 0.9) * whole)
        process.kill()
        process.wait()
    process = start(killed)
    _, messages = process.communicate()
    assert process.returncode == 0, messages[-2000:]
    for name in COMPARED:
        same = (folder / "out" / name).read_bytes() == (killed / "out" / name).read_bytes()
        assert same, f"{name} differs after kills seeded by {seed}"
    assert not list(killed.rglob("*.partial"))
    assert not list(killed.rglob("set-aside*"))

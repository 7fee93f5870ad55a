"""The summary of a run in the terminal."""

import json

import pytest

from ssnas.report.summary import summary
from tests.report.runs import ARGMAX, write_run


def test_summary_says_what_the_files_say(run_folder):
    pictures = run_folder / "pictures"
    pictures.mkdir()
    (pictures / "genotype.png").touch()
    text = summary(run_folder, report=run_folder)
    words = " ".join(text.split())
    for expected in (
        "error 12.34 % 43.21 % 90.12 %",
        "balanced accuracy 87.65 % 54.32 % 50.00 %",
        "exponential profile · imbalance 20 · 3 classes",
        "train 1,274 · val 750 · test 300",
        "made up for this test · sha256 0123456789ab",
        "5 sep_conv_3x3, 2 skip_connect, 1 dil_conv_3x3",
        "0.81 M parameters",
        "cat 0.95, dog 0.65",
        "xray · 5 folds · balanced accuracy 95.12 ± 1.23 %",
        "scale small · 1 seed (7) · cpu · search 85 s · fine-tuning 2.0 h",
        "main/index.html",
        "genotype.png",
    ):
        assert expected in words, expected


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [2, 14, 100])
def test_summary_fits_a_terminal(tmp_path, classes, multi_label):
    folder = tmp_path / "a run of a rather long name" / ("x" * 60)
    write_run(folder, [f"class number {i} " + "y" * 40 for i in range(classes)], multi_label)
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    data |= {"source": "path/" * 30, "origin": "a long story " * 40}
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "genotype.json").write_text(ARGMAX.to_json(), encoding="utf-8")
    cost = {"seconds": 1e6, "device": "a device of a long name " * 4}
    (folder / "finetune.cost.json").write_text(json.dumps(cost), encoding="utf-8")
    transfer = {"dataset": "somewhere else " * 12, "folds": 5, "macro_auc": 0.5}
    (folder / "transfer.json").write_text(json.dumps(transfer), encoding="utf-8")
    lines = summary(folder).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 88
    assert ("AUC" in "".join(line[:8] for line in lines)) == multi_label


def test_summary_without_transfer_and_optional_keys(tmp_path):
    write_run(tmp_path)
    (tmp_path / "transfer.json").write_text("{}", encoding="utf-8")
    for name in ("data", "finetune"):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")
    words = " ".join(summary(tmp_path).split())
    assert "transfer none; to another data set with `dvc exp run -S transfer.dataset=" in words
    assert "unnamed data · 3 classes" in words
    (tmp_path / "transfer.json").unlink()
    assert "transfer.dataset" not in summary(tmp_path)

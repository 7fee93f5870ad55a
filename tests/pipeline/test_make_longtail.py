"""What make-longtail says of the images: in the log and in data.json."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ssnas.config.load import load_main
from ssnas.pipeline.make_longtail import make_longtail


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Forty different images in two classes, as the data set of a project."""
    monkeypatch.chdir(tmp_path)
    document = {"dataset": "mine", "data": {"profile": "natural"}, "scales": {"small": {}}}
    Path("params.yaml").write_text(yaml.safe_dump(document))
    rng = np.random.default_rng(0)
    for i in range(40):
        path = Path("mine", "ab"[i % 2], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return Path("mine")


def warnings(caplog):
    caplog.clear()
    make_longtail(load_main())
    written = json.loads(Path("metrics/main/data.json").read_text())["warnings"]
    assert [f"warning: {line}" for line in written] == caplog.messages
    return written


def test_nothing_to_say(folder, caplog):
    assert warnings(caplog) == []


def test_what_was_left_out(folder, caplog):
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "b" / "broken.png").write_bytes(b"x")
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["data"]["bad_images"] = "skip"
    Path("params.yaml").write_text(yaml.safe_dump(document))
    assert warnings(caplog) == [
        "left out as unreadable: 1 image files (b/broken.png)",
        "left out as no images: 1 files (a/notes.txt)",
    ]


@pytest.mark.parametrize("linked", ["mine", "mine/a", "mine/a/0.png"])
def test_links(folder, caplog, linked):
    Path(linked).rename("elsewhere")
    Path(linked).symlink_to(Path("elsewhere").resolve())
    (line,) = warnings(caplog)
    named = Path(linked).relative_to("mine").as_posix()
    assert line.startswith("links, behind which DVC does not look: 1")
    assert f"({named})" in line and "dvc repro -f inputs" in line


def test_a_guessed_white_level(folder, caplog):
    for path in folder.rglob("*.png"):
        pixels = np.asarray(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(pixels).save(path)
    (line,) = warnings(caplog)
    assert "4095" in line and "data.white_level" in line
    assert json.loads(Path("metrics/main/data.json").read_text())["white_level"] == 4095

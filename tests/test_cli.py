"""The command `ssnas`, from a folder of pictures to predictions."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import ssnas
from ssnas.cli import main

SHORT = [
    f"--set={assignment}"
    for assignment in (
        "search.channels=4", "search.epochs=1", "search.batch_size=8", "search.projector=8",
        "finetune.epochs=6", "finetune.batch_size=8", "finetune.learning_rate=0.1",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for level, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 100, (10, 12)) + 150 * level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    main(["fit", str(photos), "--out", str(out), "--size", "8", "--device", "cpu", *SHORT])
    return out


@pytest.mark.slow
def test_fit_leaves_a_model_a_card_and_a_report(run, capsys):
    assert (run / "MODEL_CARD.md").read_text().startswith("# Model card")
    assert (run / "report" / "index.html").exists()
    model = ssnas.load(run / "model.ssnas")
    assert model.class_names == ("dark", "light")
    main(["info", str(run / "model.ssnas")])
    assert "dark" in capsys.readouterr().out
    main(["report", str(run)])
    printed = capsys.readouterr().out
    assert "balanced accuracy" in printed and str(run / "MODEL_CARD.md") in printed


@pytest.mark.slow
def test_fit_without_test_images_leaves_a_model(photos, tmp_path, capsys):
    out = tmp_path / "mine"
    options = ["--size", "8", "--device", "cpu", "--set", "test_fraction=0"]
    main(["fit", str(photos), "--out", str(out), *options, *SHORT])
    assert str(out / "model.ssnas") in capsys.readouterr().out
    assert ssnas.load(out / "model.ssnas").class_names == ("dark", "light")


@pytest.mark.slow
def test_predictions_as_a_table_and_as_a_file(run, photos, tmp_path, capsys):
    images = [str(photos / "light" / "3.png"), str(photos / "dark")]
    main(["predict", str(run / "model.ssnas"), *images, "--prior", "dark=0.5,light=0.5"])
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table.columns) == ["image", "class", "P(dark)", "P(light)"]
    assert table["image"][0] == images[0] and len(table) == 21
    expected = ssnas.load(run / "model.ssnas").predict(images[:1], [0.5, 0.5])
    assert table["class"][0] == expected["class"].iloc[0]
    assert table["P(dark)"][0] == pytest.approx(expected["P(dark)"].iloc[0], rel=1e-5)
    main(["predict", str(run / "model.ssnas"), *images, "--csv", str(tmp_path / "a" / "p.csv")])
    assert "21 predictions" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "a" / "p.csv")) == 21


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{photos}/none.png"], ["none.png", "No such file"]),
        (["{empty}"], ["found no image"]),
        (["{text}"], ["notes.png", "no known image format"]),
        (["{photos}/dark", "--prior", "dark=0.5,cat=0.5"], ["cat", "dark, light"]),
        (["{photos}/dark", "--prior", "fair"], ["fair", "balanced"]),
        (["{photos}/dark", "--prior", "f1"], ["f1", "balanced"]),
    ],
)
def test_what_cannot_be_predicted_is_one_line(run, photos, tmp_path, capsys, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.png").write_text("no image")
    places = {"photos": photos, "empty": tmp_path / "empty", "text": tmp_path / "notes.png"}
    with pytest.raises(SystemExit) as end:
        main(["predict", str(run / "model.ssnas"), *(o.format(**places) for o in options)])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_images_of_any_size_and_mode_are_classified(run, tmp_path, capsys):
    black = {"CMYK": (0, 0, 0, 255), "LA": (0, 255), "RGBA": (0, 0, 0, 255)}
    for i, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")):
        image = Image.new(mode, (5 + 7 * i, 30), black.get(mode, 0))
        image.save(tmp_path / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    main(["predict", str(run / "model.ssnas"), str(tmp_path)])
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert len(table) == 8
    assert table["P(dark)"].nunique() == 1  # all of them are black


@pytest.mark.slow
def test_an_exported_graph(run, tmp_path, capsys):
    main(["export", str(run / "model.ssnas"), "--onnx", str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "no.ssnas", "a.png"], ["no.ssnas", "not found"]),
        (["info", "README.md"], ["README.md"]),
        (["fit", "no/folder", "--out", "{out}"], ["no/folder", "image folder"]),
        (["fit", "digits", "--out", "{out}", "--loss", "hinge"], ["loss", "hinge", "focal+la"]),
        (["fit", "digits", "--out", "{out}", "--set", "epochs"], ["--set", "KEY=VALUE"]),
        (["fit", "digits", "--out", "{out}", "--set", "a.b.c=1"], ["--set", "KEY=VALUE"]),
        (["fit", "digits", "--out", "{out}", "--prior", "a=b"], ["--prior", "class=frequency"]),
        (["fit", "digits", "--out", "{out}", "--params", "no.yaml"], ["no.yaml", "not found"]),
        (["report", "no/run"], ["no/run", "ssnas fit"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main([argument.format(out=out) for argument in arguments])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    def missing(options):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr("ssnas.cli._info", missing)
    with pytest.raises(SystemExit) as end:
        main(["info", "model.ssnas"])
    assert end.value.code == 2
    assert "sklearn is not installed; pip install 'ssnas[train]'" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssnas.cli._info", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["info", "model.ssnas"])
    assert end.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ssnas {ssnas.__version__}\n"

"""Missing, damaged and odd files of a run."""

import re

import pytest

from ssnas.errors import InputError
from ssnas.report.files import read_csv
from ssnas.report.page import write_html
from ssnas.report.pictures import per_class_picture
from ssnas.report.summary import summary
from tests.report.runs import write_csv


@pytest.mark.parametrize(
    "entry",
    [summary, lambda folder: write_html(folder, folder / "genotype.svg", folder / "r.html")],
)
@pytest.mark.parametrize(
    "name", ["data.json", "genotype.json", "finetune.json", "evaluate.json", "per_class.csv"]
)
def test_missing_file_names_the_command_that_makes_it(run_folder, tmp_path, entry, name):
    for file in run_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*dvc repro"):
        entry(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "cannot be read"),
        ("name,train_images\n", "no rows"),
        ("a,b\n1,2\n", "train_images|name"),
    ],
)
def test_malformed_csv_is_an_input_error(tmp_path, content, complaint):
    path = tmp_path / "per_class.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=complaint):
        per_class_picture(path, tmp_path / "x.png")


@pytest.mark.parametrize("name", ["NA", "nan", "None", "007", "1e3", "true"])
def test_class_names_stay_text(tmp_path, name):
    header, row = ("name", "actual", "train_images", "recall"), (name, name, 3, "")
    write_csv(tmp_path / "per_class.csv", header, [row])
    table = read_csv(tmp_path / "per_class.csv", "name")
    assert table["name"].tolist() == table["actual"].tolist() == [name]
    assert table["train_images"].tolist() == [3]
    assert table["recall"].isna().all()

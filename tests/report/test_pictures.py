"""Pictures of a run, from its CSV files."""

import warnings

import pytest
from PIL import Image

from ssnas.networks.operations import OPERATIONS
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from tests.report.runs import write_csv

OPS = tuple(OPERATIONS)


@pytest.mark.parametrize("classes", [1, 14, 100])
def test_pictures_of_any_number_of_long_class_names(tmp_path, classes):
    names = [f"{i:03d} a class with a rather long name" for i in range(classes)]
    rows = [(i, name, 500, 500 - 4 * i, 1, 1) for i, name in enumerate(names)]
    header = ("class", "name", "before", "train", "val", "test")
    write_csv(tmp_path / "class_counts.csv", header, rows)
    figures = [(name, 500 - 4 * i, 1, 0.5) for i, name in enumerate(names)]
    write_csv(
        tmp_path / "per_class.csv", ("name", "train_images", "test_images", "recall"), figures
    )
    for name, draw in (("class_counts", class_counts_picture), ("per_class", per_class_picture)):
        draw(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.height < image.width < 2400


def test_confusion_of_a_class_without_test_images_divides_by_no_zero(tmp_path):
    rows = [("cat", "cat", 3), ("cat", "dog", 1), ("dog", "cat", 0), ("dog", "dog", 0)]
    write_csv(tmp_path / "confusion.csv", ("actual", "predicted", "count"), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_picture(tmp_path / "confusion.csv", tmp_path / "confusion.png")


def test_alpha_of_one_cell_and_few_edges(tmp_path):
    rows = [(epoch, "normal", "0->2", op, 0.5) for epoch in (1, 2) for op in OPS]
    write_csv(tmp_path / "alpha.csv", ("epoch", "cell", "edge", "op", "weight"), rows)
    alpha_picture(tmp_path / "alpha.csv", tmp_path / "alpha.png")
    with Image.open(tmp_path / "alpha.png") as image:
        assert image.width == 11 * 160


def test_curves_need_neither_a_search_nor_every_column(run_folder, tmp_path):
    write_csv(tmp_path / "finetune.csv", ("epoch", "loss"), [(1, 2.0), (2, 1.0)])
    curves_picture(None, tmp_path / "finetune.csv", tmp_path / "little.png")
    curves_picture(run_folder / "search.csv", None, tmp_path / "search.png")
    heights = []
    for name in ("little", "search"):
        with Image.open(tmp_path / f"{name}.png") as image:
            heights.append(image.height)
    assert heights[1] == 2 * heights[0]  # six panels take two rows, one panel takes one

"""Read the source, hold out test and validation images, and make the rest long-tailed."""

import logging
from typing import Any

from ssnas.config.decide import named_prior
from ssnas.config.schema import Data, Run, Transfer
from ssnas.data.checks import oddities
from ssnas.data.folders import DEEPEST, Options
from ssnas.data.sources import load
from ssnas.data.splits import split
from ssnas.data.splits import write as write_splits
from ssnas.data.types import Source, Splits
from ssnas.data.unlabelled import read_unlabelled
from ssnas.errors import InputError
from ssnas.pipeline.artifacts import RAW, Places, write_csv, write_json
from ssnas.pipeline.lineage import made_from, record

log = logging.getLogger(__name__)


def make_longtail(run: Run) -> None:
    """Write the training, validation and test images, and the images of each class."""
    places, source = Places.of(run), source_of(run.data)
    # A wrong decision would otherwise end the run after the training.
    named_prior(run.decide, source.train.class_names, source.train.multi_label)
    splits = splits_of(run, source)
    warnings = warnings_of(splits)
    for warning in warnings:
        log.warning("warning: %s", warning)
    about = made_from(run, "splits")
    write_splits(splits, places.splits)
    record(run, "splits", about)
    about_images = {**splits.provenance, "warnings": warnings}
    write_json(places.metrics("datasets", "data.json"), about_images)
    write_csv(places.metrics("datasets", "class_counts.csv"), _class_counts(splits))


def splits_of(run: Run, source: Source) -> Splits:
    """Split the images of the run's source as its section `data` says."""
    data = run.data
    options = Options(bad_images=data.bad_images, white_level=data.white_level)
    return split(
        source,
        profile=data.profile,
        imbalance=data.imbalance,
        largest_class=None if data.profile == "natural" else data.largest_class,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=run.seeds["datasets"],
        max_images=data.max_images,
        labelled_fraction=data.labelled_fraction,
        unlabelled=None
        if data.unlabelled is None
        else read_unlabelled(data.unlabelled, source.train, options),
    )


def source_of(data: Data | Transfer) -> Source:
    """Read the images that a section of the parameters names.

    Raises:
        InputError: if it names none, or what `ssnas.data.load` refuses.
    """
    if data.dataset is None:
        raise InputError("dataset: found null; accepted: a data set")
    return load(
        data.dataset,
        RAW,
        data.size,
        data.channels,
        data.bad_images,
        data.flip,
        data.white_level,
        data.groups,
    )


def warnings_of(splits: Splits) -> list[str]:
    """List what a person should know of the images, and of how they were read."""
    read = splits.provenance
    lines = oddities(splits)
    for key, text in (
        ("skipped", "left out as unreadable: {} image files"),
        ("ignored", "left out as no images: {} files"),
        (
            "linked",
            "links, behind which DVC does not look: {}; after a change there, run "
            "`dvc repro -f inputs`",
        ),
    ):
        listed = read.get(key) or {}
        if listed.get("count"):
            names = ", ".join(listed["names"][:3])
            more = ", …" if listed["count"] > 3 else ""
            lines.append(f"{text.format(listed['count'])} ({names}{more})")
    white = read.get("white_level")
    if white and white < DEEPEST:
        lines.append(
            f"the images hold values up to {white} at most, which was taken for white; "
            "data.white_level says otherwise"
        )
    return lines


def _class_counts(splits: Splits) -> list[dict[str, Any]]:
    parts = (splits.provenance["counts_before"], *(s.counts for s in (splits.train, splits.val)))
    columns = zip(splits.train.class_names, *parts, splits.test.counts, strict=True)
    return [
        {"class": i, "name": name, "before": before, "train": train, "val": val, "test": test}
        for i, (name, before, train, val, test) in enumerate(columns)
    ]

"""Read the source, hold out test and validation images, and make the rest long-tailed."""

from typing import Any

from ssnas.config.decide import named_prior
from ssnas.config.schema import Data, Run, Transfer
from ssnas.data.sources import load
from ssnas.data.splits import split
from ssnas.data.splits import write as write_splits
from ssnas.data.types import Source, Splits
from ssnas.errors import InputError
from ssnas.pipeline.artifacts import RAW, Places, write_csv, write_json
from ssnas.pipeline.lineage import made_from, record


def make_longtail(run: Run) -> None:
    """Write the training, validation and test images, and the images of each class."""
    data, places = run.data, Places.of(run)
    source = source_of(data)
    # A wrong decision would otherwise end the run after the training.
    named_prior(run.decide, source.train.class_names, source.train.multi_label)
    natural = data.profile == "natural"
    splits = split(
        source,
        profile=data.profile,
        imbalance=data.imbalance,
        largest_class=None if natural else data.largest_class,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=run.seeds["datasets"],
        max_images=data.max_images,
    )
    about = made_from(run, "splits")
    write_splits(splits, places.splits)
    record(run, "splits", about)
    write_json(places.metrics("datasets", "data.json"), splits.provenance)
    write_csv(places.metrics("datasets", "class_counts.csv"), _class_counts(splits))


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


def _class_counts(splits: Splits) -> list[dict[str, Any]]:
    parts = (splits.provenance["counts_before"], *(s.counts for s in (splits.train, splits.val)))
    columns = zip(splits.train.class_names, *parts, splits.test.counts, strict=True)
    return [
        {"class": i, "name": name, "before": before, "train": train, "val": val, "test": test}
        for i, (name, before, train, val, test) in enumerate(columns)
    ]

"""Read the test images, once, and write every figure of the fine-tuned network on them."""

from typing import Any

import numpy as np

from ssnas import data as datasets
from ssnas import metrics
from ssnas.artifacts import (
    Places,
    finetune_description,
    load_weights,
    read_splits,
    write_csv,
    write_json,
)
from ssnas.config.schema import Run
from ssnas.data.views import Normalise
from ssnas.finetune import figures, mixing_sweep, predict
from ssnas.networks.baselines import linear_classifier
from ssnas.networks.bilateral import BilateralSupernet
from ssnas.runtime.device import choose_device
from stages.cli import main
from stages.network import network_of


def evaluate(run: Run) -> None:
    """Write all figures, each beside a linear classifier's and a constant predictor's."""
    places, device = Places(run.folders), choose_device(run.device)
    splits = read_splits(run)
    train, test = splits.train, splits.test
    network = network_of(run, train)
    network.load_state_dict(load_weights(places.network, finetune_description(run)))
    normalise = Normalise.of(train.images)
    probabilities = predict(network, test, normalise, device)
    linear = figures(linear_classifier(train, test), test, train.counts)
    constant = metrics.constant_predictor(train.labels, test.labels, test.multi_label)
    measured: dict[str, Any] = (
        figures(probabilities, test, train.counts)
        | {f"linear_{key}": value for key, value in linear.items()}
        | {f"constant_{key}": value for key, value in constant.items()}
    )
    if isinstance(network, BilateralSupernet):
        measured["mixing_ratio"] = mixing_sweep(network, test, normalise, device)
    write_json(places.metrics("rows", "evaluate.json"), measured)
    _write_per_class(places, train, test, probabilities)


def _write_per_class(
    places: Places, train: datasets.Dataset, test: datasets.Dataset, probabilities: np.ndarray
) -> None:
    measure = metrics.per_label_auc if test.multi_label else metrics.per_class_recall
    column = "auc" if test.multi_label else "recall"
    names = test.class_names
    table = zip(names, train.counts, test.counts, measure(probabilities, test.labels), strict=True)
    write_csv(
        places.metrics("rows", "per_class.csv"),
        [
            {"name": name, "train_images": n, "test_images": m, column: value}
            for name, n, m, value in table
        ],
    )
    write_csv(
        places.metrics("rows", "confusion.csv"),
        [
            {"actual": names[actual], "predicted": names[predicted], "count": int(count)}
            for (actual, predicted), count in np.ndenumerate(
                metrics.confusion(probabilities, test.labels)
            )
        ],
    )


if __name__ == "__main__":
    main(("rows", "baselines"), evaluate)

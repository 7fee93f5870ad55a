"""Read the test images, once, and write every figure of the fine-tuned network on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssnas import metrics
from ssnas.config.decide import named_prior
from ssnas.config.schema import Finetune, Run
from ssnas.data.types import Dataset, Splits
from ssnas.data.views import Normalise
from ssnas.decision import Decision, decision_of
from ssnas.errors import InputError
from ssnas.finetune import logits_of, mixing_sweep
from ssnas.networks.baselines.linear import linear_classifier
from ssnas.networks.bilateral import BilateralSupernet
from ssnas.pipeline.artifacts import (
    Places,
    write_csv,
    write_json,
)
from ssnas.pipeline.lineage import made_from, record
from ssnas.pipeline.readers import finetuned_weights, network_of, read_splits
from ssnas.runtime.device import choose_device

DECIDED = (
    "accuracy",
    "error_rate",
    "binary_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "expected_calibration_error",
    "log_loss",
)
"""The figures that depend on the decision, and are written for each."""


def evaluate(run: Run) -> None:
    """Write all figures, each beside a linear classifier's and a constant predictor's.

    The temperature and the thresholds of the decisions are fitted on the validation images. The
    figures of the run's own decision come first, with intervals; the error and the calibration of
    each other decision follow.

    Raises:
        InputError: if there are no test images, or for a decision that the network cannot make.
    """
    places, device = Places.of(run), choose_device(run.device)
    splits, about = read_splits(run), made_from(run, "figures")
    train, test = splits.train, splits.test
    if not len(test):
        raise InputError("data.test_fraction: found 0, so there are no test images to evaluate on")
    network = trained_network(run, train)
    normalise = Normalise.of(train.images)
    decision = calibrate(run.finetune, network, splits, normalise, device)
    logits = logits_of(network, test, normalise, device)
    chosen = named_prior(run.decide, train.class_names, train.multi_label)
    probabilities = decision(logits, chosen).numpy()
    threshold = decision.threshold(chosen)
    intervals = metrics.intervals(
        probabilities,
        test.labels,
        class_counts=train.counts,
        thresholds=threshold,
        ranking=decision(logits, "published").numpy(),
        groups=test.groups,
    )
    linear = metrics.figures(linear_classifier(train, splits.val, test), test.labels, train.counts)
    constant = metrics.constant_predictor(train.labels, test.labels)
    measured: dict[str, Any] = (
        {"decide": run.decide}
        | {"temperature": decision.temperature, "validation_images": len(splits.val)}
        | metrics.figures(probabilities, test.labels, train.counts, threshold)
        | areas(decision, logits, test)
        | {f"linear_{key}": value for key, value in linear.items()}
        | {f"constant_{key}": value for key, value in constant.items()}
        | {"decisions": by_decision(decision, logits, test)}
        | {"intervals": intervals}
    )
    if isinstance(network, BilateralSupernet):
        measured["mixing_ratio"] = mixing_sweep(network, test, normalise, device)
    write_json(places.metrics("rows", "evaluate.json"), measured)
    record(run, "figures", about)
    _write_per_class(places, train, test, probabilities, threshold)


def trained_network(run: Run, data: Dataset) -> nn.Module:
    """Build the run's network with its fine-tuned weights."""
    network = network_of(run, data)
    network.load_state_dict(finetuned_weights(run))
    return network


def calibrate(
    config: Finetune,
    network: nn.Module,
    splits: Splits,
    normalise: Normalise,
    device: torch.device,
) -> Decision:
    """Make the decision of a network that was trained by `config`, fitted on validation images."""
    train, val = splits.train, splits.val
    decision = decision_of(config, train.counts, len(train), train.multi_label)
    return decision.fitted(logits_of(network, val, normalise, device), val.labels)


def by_decision(decision: Decision, logits: Tensor, data: Dataset) -> dict[str, dict[str, float]]:
    """Measure each decision by the figures that depend on it.

    Args:
        logits: (N, C) of the images.
        data: their labels.
    """
    figures = {}
    for name in decision.names:
        probabilities = decision(logits, name).numpy()
        measured = metrics.figures(probabilities, data.labels, thresholds=decision.threshold(name))
        figures[name] = {key: measured[key] for key in DECIDED if key in measured}
    return figures


def areas(decision: Decision, logits: Tensor, data: Dataset) -> dict[str, float]:
    """Measure the areas under the curves: once, of the published probabilities.

    A prior changes them only where there are several classes, and there by little.
    """
    published = metrics.figures(decision(logits, "published").numpy(), data.labels)
    return {k: published[k] for k in ("macro_auc", "macro_average_precision") if k in published}


def _write_per_class(
    places: Places,
    train: Dataset,
    test: Dataset,
    probabilities: np.ndarray,
    threshold: np.ndarray | float,
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
                metrics.confusion(probabilities, test.labels, threshold)
            )
        ],
    )

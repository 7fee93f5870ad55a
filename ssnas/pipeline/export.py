"""Write the model to take away: one file, and a graph for ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ssnas.config.recipes import shaped
from ssnas.config.schema import Run
from ssnas.data.folders import DEEPEST
from ssnas.data.types import Splits
from ssnas.data.views import Normalise
from ssnas.model import Description, Model
from ssnas.pipeline.artifacts import Places, write_json
from ssnas.pipeline.evaluate import calibrate, trained_network
from ssnas.pipeline.lineage import verified
from ssnas.pipeline.readers import genotype_of, read_splits
from ssnas.runtime.device import choose_device, machine
from ssnas.runtime.mapped import spread

COMPARED = 10_000
REPEATS = 20
BATCHES = (1, 64)
PROVENANCE = ("source", "origin", "sha256", "note", "profile", "imbalance")


def export(run: Run) -> None:
    """Write model.ssnas and model.onnx, how far they differ, and how fast both are on a CPU.

    The test images, at most `COMPARED` of them, are shown to both; their labels are not read.
    """
    places, splits = Places.of(run), read_splits(run)
    model = model_of(run, splits, "cpu")
    graph = places.model.with_suffix(".onnx")
    model.save(places.model)
    model.export_onnx(graph)
    shown = splits.test if len(splits.test) else splits.val
    images = (
        shown.images if len(shown) <= COMPARED else shown.take(spread(len(shown), COMPARED)).images
    )

    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def by_onnx(chunk: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"images": chunk})[0])

    differences = [
        np.abs(by_onnx(chunk) - model.predict_proba(chunk)).max() for chunk in _batches(images, 64)
    ]
    facts = {
        "images": len(images),
        "largest_difference": float(max(differences)),
        "model_bytes": places.model.stat().st_size,
        "onnx_bytes": graph.stat().st_size,
    }
    write_json(places.metrics("rows", "export.json"), facts)
    cost: dict[str, Any] = {}
    for batch in BATCHES:
        chunk = np.resize(images, (batch, *images.shape[1:]))
        for name, predict in (("torch", model.predict_proba), ("onnx", by_onnx)):
            cost[f"{name}_ms_at_batch_{batch}"] = round(_median_ms(predict, chunk), 3)
    write_json(places.metrics("rows", "export.cost.json"), cost | machine(model.device))


def model_of(run: Run, splits: Splits, device: str | None = None) -> Model:
    """Make the model of a run whose network is trained.

    Args:
        device: where it computes; None for the run's own.

    Raises:
        InputError: if the weights are missing, or made with other parameters or data.
    """
    train, normalise = splits.train, Normalise.of(splits.train.images)
    network = trained_network(run, train)
    decision = calibrate(run.finetune, network, splits, normalise, choose_device(run.device))
    height, width, channels = train.images.shape[1:]
    description = Description(
        class_names=train.class_names,
        multi_label=train.multi_label,
        image_shape=(height, width, channels),
        normalise=normalise,
        counts=tuple(train.counts),
        num_images=len(train),
        finetune=run.finetune,
        search=shaped(run.search, len(train), height),
        genotype=genotype_of(run),
        temperature=decision.temperature,
        thresholds=decision.thresholds,
        decide=run.decide if decision.seen else "published",
        white_level=splits.provenance.get("white_level") or DEEPEST,
        provenance=_provenance(run, splits),
    )
    return Model(network, description, device or run.device)


def _provenance(run: Run, splits: Splits) -> dict[str, Any]:
    known = {key: splits.provenance.get(key) for key in PROVENANCE}
    headline = {}
    if len(splits.test):
        measured = json.loads(verified(run, "figures").read_text(encoding="utf-8"))
        headline = {
            key: {"value": measured[key], "interval": measured["intervals"].get(key)}
            for key in ("balanced_accuracy", "macro_auc")
            if key in measured
        }
    return {
        **{key: value for key, value in known.items() if value is not None},
        "images": {
            "train": len(splits.train),
            "val": len(splits.val),
            "test": len(splits.test),
        },
        "scale": run.scale,
        "seeds": dict(run.seeds),
        "views": dataclasses.asdict(run.views),
        "test": headline,
    }


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _median_ms(predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    predict(images)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds))

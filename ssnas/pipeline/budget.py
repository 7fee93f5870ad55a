"""A time that search and training share: how many epochs of each fit into it on this machine."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssnas import search
from ssnas.config.recipes import shaped, within
from ssnas.config.schema import Run, check_value
from ssnas.finetune import epoch_seconds
from ssnas.pipeline.artifacts import write_json
from ssnas.pipeline.lineage import verified
from ssnas.pipeline.readers import network_of, read_splits
from ssnas.pipeline.search import images_of
from ssnas.runtime.device import choose_device, seed_everything
from ssnas.runtime.files import sha256_of
from ssnas.training.images import TrainingData

log = logging.getLogger(__name__)

SEARCH_SHARE = 0.4
"""The share of the time in which a search ends."""

TRAINED_SHARE = 0.93
"""The share in which the training ends; the rest is for the test and the model file."""


class Budget:
    """Chooses epochs that fit into a time, once: a run that goes on keeps them.

    Args:
        minutes: for everything, from now on.
        root: the folder that keeps the choice, in `budget.json`.

    Raises:
        InputError: for minutes that are no number above 0.
    """

    def __init__(self, minutes: float, root: Path) -> None:
        check_value(minutes, "minutes", float, {"above": 0.0, "high": 1e6})
        self.seconds, self.began = 60.0 * minutes, time.monotonic()
        self.path = root / "budget.json"

    def for_search(self, run: Run) -> Run:
        """Give the run the epochs of search that fit; a search of none stays one of none."""
        if run.search.epochs == 0:
            return run

        def measure() -> float:
            device = choose_device(run.device)
            splits = read_splits(run)
            settings = shaped(run.search, len(splits.train), splits.train.images.shape[1])
            return search.epoch_seconds(images_of(run, splits, device), settings, run.views)

        epochs = self._epochs(run, "search", SEARCH_SHARE, measure)
        return dataclasses.replace(run, search=dataclasses.replace(run.search, epochs=epochs))

    def for_training(self, run: Run) -> Run:
        """Give the run the epochs of training that fit into what is left."""

        def measure() -> float:
            splits = read_splits(run)
            seed_everything(0)
            network = network_of(run, splits.train)
            device = choose_device(run.device)
            return epoch_seconds(network, TrainingData.of(splits), run.finetune, device)

        epochs = self._epochs(run, "finetune", TRAINED_SHARE, measure)
        return dataclasses.replace(run, finetune=dataclasses.replace(run.finetune, epochs=epochs))

    def _epochs(self, run: Run, name: str, share: float, measure: Callable[[], float]) -> int:
        """Read the choice of an earlier start, or measure and choose."""
        asked = {"seconds": self.seconds, "splits": sha256_of(verified(run, "splits"))}
        asked["settings"] = json.loads(json.dumps(dataclasses.asdict(getattr(run, name))))
        kept = self._kept()
        if kept.get(name, {}).get("asked") == asked:
            return int(kept[name]["epochs"])
        epoch = measure()
        left = share * self.seconds - (time.monotonic() - self.began)
        epochs = within(getattr(run, name), left, epoch).epochs
        log.info("%s: %d epochs of %.2f s fit into the time", name, epochs, epoch)
        write_json(self.path, {**kept, name: {"epochs": epochs, "asked": asked}})
        return epochs

    def _kept(self) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept

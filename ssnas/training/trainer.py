"""The loop that every training runs in: resumable, guarded against NaN, with a progress line."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ssnas.errors import InputError
from ssnas.runtime import distributed
from ssnas.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SAVE_SECONDS = 120
REPORT_SECONDS = 5
MEASURED_STEPS, MEASURED_SECONDS = 40, 1


class Stateful(Protocol):
    """Anything that a checkpoint restores: modules, optimisers, random streams, logs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def seconds_a_step(step: Callable[[int], object], steps: int) -> float:
    """Measure the mean seconds of a training step; the first one, which prepares, does not count.

    Args:
        step: called with numbers from 0.
        steps: of an epoch; a measurement takes at most as many.
    """
    step(0)
    began, done = time.perf_counter(), 0
    while done < MEASURED_STEPS and time.perf_counter() - began < MEASURED_SECONDS:
        done += 1
        step(done % steps)
    return (time.perf_counter() - began) / done


class Trainer:
    """The loop of epochs and steps of a training, resumed exactly where it was.

    Args:
        name: of the training, in messages.
        epochs: to train for.
        state: everything that a step changes, by name: weights, optimisers, random streams.
        draw_epoch: gives an epoch's batches, an index tensor (steps, batch, …) on the CPU.
        step: trains on one batch. It is called with the epoch's batches, the epoch and the number
            of the step, both from 0, and returns scalars to average over the epoch, all of which
            must stay finite.
        finish_epoch: called after an epoch's last step with the epoch's number, from 1; returns
            more figures for its row. A true value under the key `stop` ends the training.
        checkpoint: keeps the state, or None.

    Attributes:
        history: one row of figures an epoch.
        batches: of the current epoch; None between epochs.
        done: the number of its steps that are done.
        seconds: spent so far, interrupted parts included.
    """

    REPORTED = ("loss", "loss_weights", "knn_accuracy", "decided", "val_balanced_accuracy")
    """The figures of a row that the progress line shows."""

    def __init__(
        self,
        name: str,
        epochs: int,
        state: Mapping[str, Stateful],
        draw_epoch: Callable[[], Tensor],
        step: Callable[[Tensor, int, int], dict[str, Tensor]],
        finish_epoch: Callable[[int], dict[str, Any]],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.name, self.epochs, self.state = name, epochs, dict(state)
        self.draw_epoch, self.step, self.finish_epoch = draw_epoch, step, finish_epoch
        self.checkpoint = checkpoint
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.batches: Tensor | None = None
        self.done = 0
        self._totals: dict[str, Tensor] = {}
        self._epoch_seconds = 0.0
        self._stopped = False

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return len(self.history)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from the checkpoint where there is one, and return the history.

        Raises:
            InputError: at the first step whose figures are not finite; the last checkpoint before
                it is kept.
        """
        self._resume()
        self._started = self._saved = self._reported = time.monotonic()
        self._start_epoch = len(self.history)
        # In a terminal a bar moves with every step; a log gets the lines of `_report` alone.
        hidden = True if distributed.rank() else None
        with (
            logging_redirect_tqdm(),
            tqdm(desc=self.name, unit="step", leave=False, disable=hidden) as bar,
        ):
            while len(self.history) < self.epochs and not self._stopped:
                self._run_epoch(bar)
                self._save()
                self._report(final=len(self.history) == self.epochs or self._stopped)
        return self.history

    def _run_epoch(self, bar: tqdm[Any]) -> None:
        began = time.monotonic() - self._epoch_seconds
        if self.batches is None:
            self.batches, self.done, self._totals = self.draw_epoch(), 0, {}
        batches = self.batches
        if bar.total is None:
            bar.total = self.epochs * len(batches)
            bar.n = bar.initial = self.epoch * len(batches) + self.done
        pending: list[dict[str, Tensor]] = []
        while self.done < len(batches):
            pending.append(self.step(batches, self.epoch, self.done))
            self.done += 1
            bar.update()
            # Processes that save by their own clocks would resume at different steps.
            due = time.monotonic() - self._saved > SAVE_SECONDS and not distributed.active()
            if len(pending) == self._check_steps(pending) or due:
                self._collect(pending)
            if due:
                self._epoch_seconds = time.monotonic() - began
                self._save()
        self._collect(pending)
        seconds = time.monotonic() - began
        means = {key: float(total) / len(batches) for key, total in self._totals.items()}
        self.seconds += seconds
        self.batches, self._epoch_seconds = None, 0.0
        epoch = len(self.history) + 1
        more = self.finish_epoch(epoch)
        self._stopped = bool(more.pop("stop", False))
        rate = {"images_per_second": round(batches.numel() / seconds, 1)}
        self.history.append({"epoch": epoch, **means, **more, **rate})

    @staticmethod
    def _check_steps(pending: list[dict[str, Tensor]]) -> float:
        """The number of steps between two looks at their figures.

        A look makes an accelerator wait, which then gets its next kernels one by one.
        """
        return 1 if next(iter(pending[0].values())).is_cpu else math.inf

    def _collect(self, pending: list[dict[str, Tensor]]) -> None:
        """Add the steps' figures to the epoch's totals, and empty `pending`.

        Raises:
            InputError: for the first figure that is not finite.
        """
        if not pending:
            return
        zero = torch.zeros((), dtype=torch.float64)
        for key in pending[0]:
            values = torch.stack([figures[key].detach().double() for figures in pending])
            finite = values.isfinite()
            if not finite.all():
                bad = int(finite.logical_not().nonzero()[0])
                step = self.done - len(pending) + bad + 1
                raise InputError(self._diverged(key, float(values[bad]), step))
            self._totals[key] = self._totals.get(key, zero) + values.sum().cpu()
        pending.clear()

    def _diverged(self, key: str, value: float, step: int) -> str:
        kept = "there is no checkpoint"
        if self.checkpoint is not None and self.checkpoint.path.exists():
            kept = f"the last good checkpoint is kept in {self.checkpoint.path}"
        epoch = len(self.history) + (self.batches is not None)
        return (
            f"{self.name}: {key} became {value} at epoch {epoch}, step {step}; "
            f"stopped there; {kept}; lower the learning rate, or look for broken images"
        )

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.checkpoint is None:
            return
        self._refuse_broken_weights()
        position = {
            "history": self.history,
            "seconds": self.seconds,
            "batches": self.batches,
            "done": self.done,
            "totals": self._totals,
            "epoch_seconds": self._epoch_seconds,
            "stopped": self._stopped,
        }
        parts = {name: stateful.state_dict() for name, stateful in self.state.items()}
        self.checkpoint.save({"position": position, "parts": parts})

    def _refuse_broken_weights(self) -> None:
        """Never save weights that are not finite: a loss may be finite, its gradient not."""
        for name, stateful in self.state.items():
            if isinstance(stateful, nn.Module):
                for tensor in stateful.state_dict().values():
                    if not tensor.isfinite().all():
                        raise InputError(self._diverged(f"{name} weights", math.nan, self.done))

    def _resume(self) -> None:
        saved = self.checkpoint.load() if self.checkpoint else None
        if saved is None:
            return
        for name, stateful in self.state.items():
            stateful.load_state_dict(saved["parts"][name])
        position = saved["position"]
        self.history, self.seconds = position["history"], position["seconds"]
        self.batches, self.done = position["batches"], position["done"]
        self._totals, self._epoch_seconds = position["totals"], position["epoch_seconds"]
        self._stopped = position["stopped"]
        log.info(
            "%s: going on after epoch %d of %d%s",
            self.name,
            len(self.history),
            self.epochs,
            f", step {self.done}" if self.batches is not None else "",
        )

    def _report(self, final: bool) -> None:
        now = time.monotonic()
        if not final and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        row = self.history[-1]
        done = len(self.history) - self._start_epoch
        left = (now - self._started) / done * (self.epochs - len(self.history))
        figures = [
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) and key in self.REPORTED
        ]
        log.info(
            "%s  epoch %d/%d  %s  %.0f images/s  ETA %d:%02d",
            self.name,
            row["epoch"],
            self.epochs,
            "  ".join(figures),
            row["images_per_second"],
            *divmod(round(left), 60),
        )

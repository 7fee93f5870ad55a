"""The loop that every training runs in: resumable, guarded against NaN, telling its progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.runtime import distributed
from ssnas.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SAVE_SECONDS = 120
REPORT_SECONDS = 5


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class GeneratorState:
    """A random generator as something with a state dict."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["state"])


class Loop:
    """Epochs of steps over batches of indices, resumed exactly where they were.

    Args:
        name: what the messages call it.
        epochs: how many.
        state: everything that a step changes, by name: weights, optimisers, schedulers,
            generators.
        draw_batches: gives an epoch's batches, an index tensor (steps, batch) on the CPU.
        step: trains on one batch of indices and returns scalars to average over the epoch, all
            of which must stay finite.
        finish_epoch: called with the epoch (from 1) after its last step; returns more figures for
            the epoch's row. A true value under the key `stop` ends the training.
        checkpoint: where the state is kept, or None.

    Attributes:
        history: one row of figures an epoch.
        batches: of the current epoch.
        done: how many of its steps are.
        seconds: spent so far, interrupted parts included.
    """

    def __init__(
        self,
        name: str,
        epochs: int,
        state: Mapping[str, Stateful],
        draw_batches: Callable[[], Tensor],
        step: Callable[[Tensor], dict[str, Tensor]],
        finish_epoch: Callable[[int], dict[str, Any]],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.name, self.epochs, self.state = name, epochs, dict(state)
        self.draw_batches, self.step, self.finish_epoch = draw_batches, step, finish_epoch
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
        """Train to the end, from the checkpoint if there is one of this very work.

        Raises:
            InputError: at the first step whose figures are not finite; the last checkpoint before
                it is kept.
        """
        self._resume()
        self._started = self._saved = self._reported = time.monotonic()
        self._start_epoch = len(self.history)
        while len(self.history) < self.epochs and not self._stopped:
            self._run_epoch()
            self._save()
            self._report(final=len(self.history) == self.epochs or self._stopped)
        return self.history

    def _run_epoch(self) -> None:
        began = time.monotonic() - self._epoch_seconds
        if self.batches is None:
            self.batches, self.done, self._totals = self.draw_batches(), 0, {}
        pending: list[dict[str, Tensor]] = []
        while self.done < len(self.batches):
            pending.append(self.step(self.batches[self.done]))
            self.done += 1
            # Processes that save by their own clocks would resume at different steps.
            due = time.monotonic() - self._saved > SAVE_SECONDS and not distributed.active()
            if len(pending) == self._check_steps(pending) or due:
                self._collect(pending)
            if due:
                self._epoch_seconds = time.monotonic() - began
                self._save()
        self._collect(pending)
        steps, images = len(self.batches), self.batches.numel()
        seconds = time.monotonic() - began
        means = {key: float(total) / steps for key, total in self._totals.items()}
        self.seconds += seconds
        self.batches, self._epoch_seconds = None, 0.0
        epoch = len(self.history) + 1
        extra = self.finish_epoch(epoch)
        self._stopped = bool(extra.pop("stop", False))
        rate = {"images_per_second": round(images / seconds, 1)}
        self.history.append({"epoch": epoch, **means, **extra, **rate})

    @staticmethod
    def _check_steps(pending: list[dict[str, Tensor]]) -> float:
        """How many steps may pass between looks at their figures.

        A look makes an accelerator wait, which then gets its next kernels one by one.
        """
        return 1 if next(iter(pending[0].values())).is_cpu else math.inf

    def _collect(self, pending: list[dict[str, Tensor]]) -> None:
        """Add the steps' figures to the epoch's totals; refuse what is not finite."""
        if not pending:
            return
        for key in pending[0]:
            values = torch.stack([figures[key].detach().double() for figures in pending])
            finite = values.isfinite()
            if not finite.all():
                bad = int(finite.logical_not().nonzero()[0])
                step = self.done - len(pending) + bad + 1
                raise InputError(self._diverged(key, float(values[bad]), step))
            self._totals[key] = self._totals.get(key, 0.0) + values.sum().cpu()
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
        parts = {name: part.state_dict() for name, part in self.state.items()}
        self.checkpoint.save({"position": position, "parts": parts})

    def _refuse_broken_weights(self) -> None:
        """A loss may be finite while its gradient was not: such weights are never saved."""
        for name, part in self.state.items():
            if isinstance(part, nn.Module):
                for tensor in part.state_dict().values():
                    if not tensor.isfinite().all():
                        raise InputError(self._diverged(f"{name} weights", math.nan, self.done))

    def _resume(self) -> None:
        saved = self.checkpoint.load() if self.checkpoint else None
        if saved is None:
            return
        for name, part in self.state.items():
            part.load_state_dict(saved["parts"][name])
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
        shown = [
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) and key in self.shown
        ]
        log.info(
            "%s  epoch %d/%d  %s  %.0f images/s  ETA %d:%02d",
            self.name,
            row["epoch"],
            self.epochs,
            "  ".join(shown),
            row["images_per_second"],
            *divmod(round(left), 60),
        )

    shown = ("loss", "loss_weights", "knn_accuracy", "decided", "val_balanced_accuracy")

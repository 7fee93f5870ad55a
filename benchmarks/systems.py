"""The measured steps: the project's, and the same as the published codes take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Setting
from ssnas.config.schema import Finetune, Search, Views
from ssnas.data.longtail import class_counts
from ssnas.losses import make_loss
from ssnas.networks.bilateral import build_supernet
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.genotype import derive
from ssnas.networks.supernet import PlainSupernet, Supernet, frozen_statistics
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import mixed_precision, seed_everything
from ssnas.search import Bilevel, Loss
from ssnas.training.objectives import SelfSupervised, Supervised
from ssnas.training.optimizer import Descent

SEED = 0
COUNTS = class_counts(5000, 10, "exponential", 10)


@dataclass(frozen=True)
class System:
    """The way in which a step is computed.

    Args:
        plain: as the published codes do: one operation at a time, in PyTorch's contiguous layout,
            with all gradients of α and ω in both steps, and cuDNN choosing its kernels by trial.
        amp: `bf16` or `off`.
        graphs: whether CUDA graphs replay the steps.
    """

    plain: bool = False
    amp: str = "off"
    graphs: bool = False


def systems_for(setting: Setting) -> dict[str, System]:
    """Name the fast system, its plain twin in fp32, and the fast one without each ingredient."""
    graphs, bf16 = setting.graphs == "on", setting.amp == "bf16"
    systems = {"fast": System(amp=setting.amp, graphs=graphs), "plain": System(plain=True)}
    if graphs:
        systems["fast without graphs"] = System(amp=setting.amp)
    if bf16:
        systems["fast in fp32"] = System(graphs=graphs)
        systems["plain in bf16"] = System(plain=True, amp="bf16")
    if graphs and bf16:
        systems["fast in fp32 without graphs"] = System()
    return systems


@contextmanager
def computing(system: System) -> Iterator[None]:
    """Take the steps within the context in the precision of `system`, and choose its kernels."""
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        if system.plain:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
        with mixed_precision(system.amp == "bf16"):
            yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


class PlainBilevel(Bilevel):
    """The bilevel step of the published codes: both halves leave gradients of α and of ω."""

    def step_alpha(self, val_loss: Loss, train_loss: Loss | None = None) -> dict[str, Tensor]:
        with frozen_statistics(self.supernet), frozen_statistics(self.objective):
            value, zero_one = val_loss(), self.zero_one()
            self.alpha_optimiser.zero_grad()
            (value + self.config.zero_one_weight * zero_one).backward()
        self.alpha_optimiser.step()
        return {"loss_alpha": value.detach(), "loss_zero_one": zero_one.detach()}

    def step_omega(self, train_loss: Loss) -> dict[str, Tensor]:
        value = train_loss()
        self.omega_optimiser.step(value)
        return {"loss_weights": value.detach()}


class PlainNetwork(DerivedNetwork):
    """The derived network computed as `PlainSupernet` is: one operation at a time, contiguous."""

    accelerated = False
    arrange = PlainSupernet.arrange


class SearchStep:
    """One first-order bilevel step: α on one batch, then ω on another.

    Calling it returns (α's loss, ω's loss), both taken before their own update.

    Args:
        options: more keys of `search`, for the fast system.
    """

    def __init__(self, system: System, setting: Setting, **options: Any) -> None:
        seed_everything(SEED)
        self.system, self.device = system, torch.device(setting.device)
        sizes: dict[str, Any] = {
            "channels": setting.channels,
            "cells": setting.cells,
            "batch_size": setting.batch,
        }
        config = Search(**(sizes | options))
        supernet: Supernet
        if system.plain:
            supernet = PlainSupernet(config.channels, config.cells)
        else:
            supernet = build_supernet(config, (32, 32, 3), num_classes=None)
        objective = SelfSupervised(config, Views(), supernet.out_features)
        bilevel = PlainBilevel if system.plain else Bilevel
        self.bilevel = bilevel(supernet.to(self.device), objective.to(self.device), config)
        self.of_alpha, self.of_omega = ((_images(setting), _images(setting)) for _batch in range(2))
        self._step = GraphedStep(self.bilevel.step, enabled=system.graphs)

    def __call__(self) -> tuple[Tensor, Tensor]:
        with computing(self.system):
            figures = self._step(0, *self.of_alpha, *self.of_omega)
        return figures["loss_alpha"], figures["loss_weights"]

    def halves(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return the step on α and the step on ω, each with the gradients that it needs alone."""
        loss = partial(self.bilevel.objective, self.bilevel.supernet)
        return (
            partial(Bilevel.step_alpha, self.bilevel, partial(loss, self.of_alpha, 0)),
            partial(Bilevel.step_omega, self.bilevel, partial(loss, self.of_omega, 0)),
        )


class FinetuneStep:
    """One supervised step of the network that argmax derives from random α."""

    def __init__(self, system: System, setting: Setting) -> None:
        seed_everything(SEED)
        self.system, self.device = system, torch.device(setting.device)
        config = Finetune(batch_size=setting.batch)
        architecture = Supernet(setting.channels, setting.cells).architecture()
        genotype = derive({kind: weights.detach() for kind, weights in architecture.items()})
        network = (PlainNetwork if system.plain else DerivedNetwork)(
            genotype, setting.channels, setting.cells, len(COUNTS)
        )
        self.network = network.to(self.device)
        criterion = make_loss(config.loss, COUNTS, num_images=sum(COUNTS))
        self.objective = Supervised(criterion, config.crop_padding)
        self.optimiser = Descent(self.network.parameters(), config)
        labels = torch.randint(len(COUNTS), (setting.batch,)).to(self.device)
        self.drawn = (_images(setting), labels)
        self._step = GraphedStep(self._descend, enabled=system.graphs)

    def _descend(self, epoch: int | Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        loss = self.objective(self.network, drawn, epoch)
        self.optimiser.step(loss)
        return {"loss": loss.detach()}

    def __call__(self) -> tuple[Tensor]:
        with computing(self.system):
            return (self._step(0, *self.drawn)["loss"],)


STEPS = {"search": SearchStep, "finetune": FinetuneStep}


def make_step(
    what: str, system: System, setting: Setting, **options: Any
) -> SearchStep | FinetuneStep:
    """Build a step of `STEPS` by its name."""
    return STEPS[what](system, setting, **options)


def _images(setting: Setting) -> Tensor:
    """Draw images on the CPU, so that every device sees the same."""
    return torch.randn(setting.batch, 3, setting.size, setting.size).to(setting.device)

"""The steps that are measured: the project's own, and the same as the published codes take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Setting
from ssnas import search
from ssnas.config.schema import Finetune, Search, Views
from ssnas.data.longtail import class_counts
from ssnas.losses import make_loss
from ssnas.networks.bilateral import build_supernet
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.genotype import derive
from ssnas.networks.supernet import PlainSupernet, Supernet
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import seed_everything
from ssnas.search import Bilevel
from ssnas.training import objectives
from ssnas.training.objectives import SelfSupervised, Supervised
from ssnas.training.optimizer import CosineSgd

SEED = 0
COUNTS = class_counts(5000, 10, "exponential", 10)


@dataclass(frozen=True)
class System:
    """How a step is computed.

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
    """The fast system, its plain twin in fp32, and what each ingredient of the fast one brings."""
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
def computing(system: System, device: torch.device) -> Iterator[None]:
    """Steps taken within the context are computed as `system` says."""
    with ExitStack() as stack:
        own = "off" if device.type == "cpu" else "bf16"
        if system.amp != own:
            cast = partial(torch.autocast, dtype=torch.bfloat16, enabled=system.amp == "bf16")
            stack.enter_context(replaced(objectives, "autocast", lambda on: cast(on.type)))
        if system.plain:
            stack.enter_context(replaced(search, "without_gradients", lambda _: nullcontext()))
            stack.enter_context(replaced(torch.backends.cudnn, "benchmark", True))
            stack.enter_context(replaced(torch.backends.cudnn, "deterministic", False))
        yield


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, `module.name` is `value`."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


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
        sizes = {"channels": setting.channels, "cells": setting.cells, "batch_size": setting.batch}
        config = Search(**sizes, **options)
        if system.plain:
            supernet = PlainSupernet(config.channels, config.cells)
        else:
            supernet = build_supernet(config, in_channels=3, num_classes=None)
        objective = SelfSupervised(config, Views(), supernet.out_features)
        self.bilevel = Bilevel(supernet.to(self.device), objective.to(self.device), config)
        self.of_alpha, self.of_omega = ((_images(setting), _images(setting)) for _batch in range(2))
        self._step = GraphedStep(self.bilevel.step, enabled=system.graphs)

    def __call__(self) -> tuple[Tensor, Tensor]:
        with computing(self.system, self.device):
            figures = self._step(0, *self.of_alpha, *self.of_omega)
        return figures["loss_alpha"], figures["loss_weights"]

    def halves(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """The step on α and the step on ω, each by itself, in the project's own way."""
        loss = partial(self.bilevel.objective, self.bilevel.supernet)
        return (
            partial(self.bilevel.step_alpha, partial(loss, self.of_alpha, 0)),
            partial(self.bilevel.step_omega, partial(loss, self.of_omega, 0)),
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
        self.optimiser = CosineSgd(self.network.parameters(), config)
        labels = torch.randint(len(COUNTS), (setting.batch,)).to(self.device)
        self.drawn = (_images(setting), labels)
        self._step = GraphedStep(self._descend, enabled=system.graphs)

    def _descend(self, epoch: int | Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        loss = self.objective(self.network, drawn, epoch)
        self.optimiser.step(loss)
        return {"loss": loss.detach()}

    def __call__(self) -> tuple[Tensor]:
        with computing(self.system, self.device):
            return (self._step(0, *self.drawn)["loss"],)


STEPS = {"search": SearchStep, "finetune": FinetuneStep}


def make_step(
    what: str, system: System, setting: Setting, **options: Any
) -> SearchStep | FinetuneStep:
    return STEPS[what](system, setting, **options)


def _images(setting: Setting) -> Tensor:
    """Drawn on the CPU, so that every device sees the same."""
    return torch.randn(setting.batch, 3, setting.size, setting.size).to(setting.device)

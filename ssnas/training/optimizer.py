"""The descent on ω that search, pre-training and fine-tuning share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssnas.config.schema import Sgd
from ssnas.runtime.distributed import average_gradients


class Descent:
    """SGD with momentum and cosine annealing by epoch; gradients clipped to `gradient_clip`.

    The learning rate of epoch t of T, counted from 0, is
    η_min + ½ (η_max − η_min) (1 + cos(π t / T)) (Loshchilov and Hutter 2017).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: Sgd) -> None:
        self.parameters, self.config = list(parameters), config
        self.epoch = 0
        self.optimiser = fused(
            torch.optim.SGD,
            [self.parameters],
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        if config.momentum:
            # A momentum of zero makes the first step like all others: its gradient is the first b.
            for parameter in self.parameters:
                buffer = torch.zeros_like(parameter)
                self.optimiser.state[parameter]["momentum_buffer"] = buffer

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and take one step."""
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimiser.step()

    @property
    def learning_rate(self) -> float:
        low, high = self.config.min_learning_rate, self.config.learning_rate
        progress = self.epoch / max(1, self.config.epochs)
        return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2

    def finish_epoch(self) -> None:
        self.epoch += 1
        set_rate(self.optimiser, 0, self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]


def fused(
    kind: type[Optimizer], groups: Sequence[list[nn.Parameter]], rate: float, **options: Any
) -> Optimizer:
    """An optimiser whose step is one kernel or a few, and may be captured.

    Each group has its learning rate in a tensor of its own, beside the parameters: a captured step
    would go on with a number as it was. Only PyTorch's fused optimisers read such a tensor without
    waiting for the device, and they run the same Python code on a CPU as on an accelerator; there
    they read the rate as float32.

    Args:
        kind: of those that PyTorch has fused.
        options: of `kind`, for all groups.
    """
    rates = [torch.full((), rate, dtype=torch.float32, device=g[0].device) for g in groups]
    optimiser = kind(
        [{"params": group, "lr": own} for group, own in zip(groups, rates, strict=True)],
        fused=True,
        **options,
    )

    def keep_rates(optimiser: Optimizer) -> None:
        for group, own in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = own.copy_(group["lr"])

    optimiser.register_load_state_dict_post_hook(keep_rates)
    return optimiser


def set_rate(optimiser: Optimizer, group: int, rate: float) -> None:
    """Set the learning rate of a group of a `fused` optimiser."""
    optimiser.param_groups[group]["lr"].fill_(rate)


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The backward pass inside skips these parameters."""
    needing = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)

"""The descent on ω that search, pre-training and fine-tuning share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssnas.config import Sgd
from ssnas.distributed import average_gradients


class Descent:
    """SGD with momentum and cosine annealing by epoch; gradients clipped to `gradient_clip`."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: Sgd) -> None:
        self.parameters = list(parameters)
        self.gradient_clip = config.gradient_clip
        self.optimiser = torch.optim.SGD(
            self.parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimiser, max(1, config.epochs), eta_min=config.min_learning_rate
        )

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and take one step."""
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip)
        self.optimiser.step()

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def finish_epoch(self) -> None:
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


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

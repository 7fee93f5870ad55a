"""The optimiser of the weights ω, the same for search, pre-training and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssnas.config.schema import Training
from ssnas.runtime.distributed import average_gradients

SCHEDULES = ("cosine", "one-cycle")
START_DIVISOR = 25
ADAMW_BETA = 0.999


def cosine_annealing(epoch: float, epochs: float, high: float, low: float = 0.0) -> float:
    """The learning rate of epoch t of T, from `high` at 0 to `low` at T.

    η_min + ½ (η_max − η_min) (1 + cos(π t / T)) (Loshchilov and Hutter 2017).

    Args:
        epoch: t, from 0.
        epochs: T.

    Example:
        >>> [round(cosine_annealing(epoch, 4, high=0.1), 4) for epoch in range(5)]
        [0.1, 0.0854, 0.05, 0.0146, 0.0]
    """
    progress = epoch / epochs if epochs else 0.0
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def one_cycle(progress: float, high: float, warm_up: float) -> float:
    """The learning rate of one cycle: from high / 25 up to `high`, then down to 0.

    Both ways follow half a cosine; the way up takes a share `warm_up` of the training (Smith and
    Topin 2019).

    Args:
        progress: the share of the training's steps that are done.

    Example:
        >>> [round(one_cycle(progress / 4, 0.1, warm_up=0.25), 3) for progress in range(5)]
        [0.004, 0.1, 0.075, 0.025, 0.0]
    """
    if progress < warm_up:
        low = high / START_DIVISOR
        return low + high - cosine_annealing(progress, warm_up, high, low)
    return cosine_annealing(progress - warm_up, 1 - warm_up, high)


class Descent:
    """SGD or AdamW on weights, with clipped gradients and a scheduled learning rate.

    Args:
        parameters: to train.
        config: the optimiser, the schedule with its rates, momentum, weight decay, the largest norm
            of the gradient, and the number of epochs.
        steps: of an epoch, by which the schedule `one-cycle` counts; `cosine` counts by epochs.

    Attributes:
        optimiser: PyTorch's.
        learning_rate: of the next step.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> settings = Training(epochs=2, learning_rate=0.5, weight_decay=0.0)
        >>> descent = Descent([weight], settings)
        >>> descent.step(weight.sum())
        >>> weight.tolist()
        [0.5, 0.5]
        >>> descent.schedule(epoch=1, step=0)
        >>> descent.learning_rate
        0.25
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: Training, steps: int = 1
    ) -> None:
        self.parameters, self.config, self.steps = list(parameters), config, steps
        self.learning_rate = self._rate(0, 0)
        self.optimiser = OPTIMISERS[config.optimiser](self._groups(), self.learning_rate, config)

    def _groups(self) -> list[dict[str, Any]]:
        """Group the parameters by their weight decay."""
        config = self.config
        decayed = [p for p in self.parameters if config.decay_norms or p.ndim > 1]
        others = [p for p in self.parameters if not (config.decay_norms or p.ndim > 1)]
        groups = ((decayed, config.weight_decay), (others, 0.0))
        return [{"params": group, "weight_decay": decay} for group, decay in groups if group]

    def schedule(self, epoch: int, step: int) -> None:
        """Set the learning rate of a step, both numbers from 0."""
        rate = self._rate(epoch, step)
        if rate != self.learning_rate:
            self.learning_rate = rate
            for group in range(len(self.optimiser.param_groups)):
                set_rate(self.optimiser, group, rate)

    def _rate(self, epoch: int, step: int) -> float:
        config = self.config
        if config.schedule == "one-cycle":
            progress = (epoch * self.steps + step) / max(1, config.epochs * self.steps)
            return one_cycle(progress, config.learning_rate, config.warm_up)
        return cosine_annealing(
            epoch, config.epochs, config.learning_rate, config.min_learning_rate
        )

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and take one step."""
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "learning_rate": self.learning_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.learning_rate = state["learning_rate"]


Groups = Sequence[dict[str, Any]]
"""Parameters, each group with its own options, as PyTorch's optimisers take them."""


def _sgd(groups: Groups, rate: float, config: Training) -> Optimizer:
    made = fused(torch.optim.SGD, groups, rate, momentum=config.momentum)
    if config.momentum:
        # Zeros make the first step like all others: its momentum is its gradient alone.
        for group in groups:
            for parameter in group["params"]:
                made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def _adamw(groups: Groups, rate: float, config: Training) -> Optimizer:
    betas = (config.momentum, ADAMW_BETA)
    # A fused AdamW counts its steps on the device anyway, but recording asks for the flag.
    return fused(torch.optim.AdamW, groups, rate, betas=betas, capturable=True)


OPTIMISERS: dict[str, Callable[[Groups, float, Training], Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}
"""The optimisers of ω by name: SGD with momentum, and AdamW (Loshchilov and Hutter 2019)."""


def fused(
    optimiser: Callable[..., Optimizer], groups: Groups, rate: float, **options: Any
) -> Optimizer:
    """Make an optimiser whose step is a few kernels and may be recorded as a CUDA graph.

    Each group has its learning rate in a tensor of its own, beside the parameters: a recorded step
    would go on with a number as it was. Only PyTorch's fused optimisers read such a tensor without
    waiting for the device. They run the same Python code on a CPU as on an accelerator, and read
    the rate as float32.

    Args:
        optimiser: a class that PyTorch has fused, such as `torch.optim.SGD`.
        groups: of parameters; each has a learning rate of its own, see `set_rate`.
        rate: of all groups at first.
        options: more arguments of `optimiser`, for all groups.
    """
    rates = [
        torch.full((), rate, dtype=torch.float32, device=group["params"][0].device)
        for group in groups
    ]
    made = optimiser(
        [{**group, "lr": lr} for group, lr in zip(groups, rates, strict=True)],
        fused=True,
        **options,
    )

    def keep_rate_tensors(loaded: Optimizer) -> None:
        for group, lr in zip(loaded.param_groups, rates, strict=True):
            group["lr"] = lr.copy_(group["lr"])

    made.register_load_state_dict_post_hook(keep_rate_tensors)
    return made


def set_rate(optimiser: Optimizer, group: int, rate: float) -> None:
    """Set the learning rate of one group of a `fused` optimiser, in place.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimiser = fused(torch.optim.SGD, [{"params": [weight]}], rate=0.5)
        >>> set_rate(optimiser, group=0, rate=0.25)
        >>> optimiser.param_groups[0]["lr"]
        tensor(0.2500)
    """
    optimiser.param_groups[group]["lr"].fill_(rate)


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Spare backward passes inside the context the gradients of these parameters.

    Example:
        >>> weight, alpha = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        >>> with without_gradients([weight]):
        ...     (weight * alpha).sum().backward()
        >>> weight.grad, alpha.grad
        (None, tensor([1.]))
    """
    spared = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in spared:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in spared:
            parameter.requires_grad_(True)

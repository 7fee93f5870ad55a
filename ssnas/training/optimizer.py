"""The optimiser of the weights ω, the same for search, pre-training and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssnas.config.schema import Sgd
from ssnas.runtime.distributed import average_gradients


def cosine_annealing(epoch: int, epochs: int, high: float, low: float = 0.0) -> float:
    """The learning rate of epoch t of T, from `high` at 0 to `low` at T.

    η_min + ½ (η_max − η_min) (1 + cos(π t / T)) (Loshchilov and Hutter 2017).

    Args:
        epoch: t, from 0.
        epochs: T.

    Example:
        >>> [round(cosine_annealing(epoch, 4, high=0.1), 4) for epoch in range(5)]
        [0.1, 0.0854, 0.05, 0.0146, 0.0]
    """
    progress = epoch / max(1, epochs)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


class CosineSgd:
    """SGD with momentum; clipped gradients; a learning rate annealed along a cosine, by epoch.

    Args:
        parameters: to train.
        config: learning rates, momentum, weight decay, the largest norm of the gradient, and the
            number of epochs.

    Attributes:
        sgd: PyTorch's optimiser.
        epoch: the current one, from 0.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimiser = CosineSgd([weight], Sgd(epochs=2, learning_rate=0.5, weight_decay=0.0))
        >>> optimiser.step(weight.sum())
        >>> weight.tolist()
        [0.5, 0.5]
        >>> optimiser.finish_epoch()
        >>> optimiser.learning_rate
        0.25
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: Sgd) -> None:
        self.parameters, self.config = list(parameters), config
        self.epoch = 0
        self.sgd = fused(
            torch.optim.SGD,
            [self.parameters],
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        if config.momentum:
            # Zeros make the first step like all others: its momentum is its gradient alone.
            for parameter in self.parameters:
                buffer = torch.zeros_like(parameter)
                self.sgd.state[parameter]["momentum_buffer"] = buffer

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and take one step."""
        self.sgd.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.sgd.step()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current epoch, see `cosine_annealing`."""
        config = self.config
        return cosine_annealing(
            self.epoch, config.epochs, config.learning_rate, config.min_learning_rate
        )

    def finish_epoch(self) -> None:
        """Go on to the next epoch's learning rate."""
        self.epoch += 1
        set_rate(self.sgd, 0, self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"optimiser": self.sgd.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]


def fused(
    optimiser: Callable[..., Optimizer],
    groups: Sequence[list[nn.Parameter]],
    rate: float,
    **options: Any,
) -> Optimizer:
    """Make an optimiser whose step is a few kernels and may be recorded as a CUDA graph.

    Each group has its learning rate in a tensor of its own, beside the parameters: a recorded step
    would go on with a number as it was. Only PyTorch's fused optimisers read such a tensor without
    waiting for the device. They run the same Python code on a CPU as on an accelerator, and read
    the rate as float32.

    Args:
        optimiser: a class that PyTorch has fused, such as `torch.optim.SGD`.
        groups: parameters by learning rate, see `set_rate`.
        rate: of all groups at first.
        options: more arguments of `optimiser`, for all groups.
    """
    rates = [torch.full((), rate, dtype=torch.float32, device=g[0].device) for g in groups]
    made = optimiser(
        [{"params": group, "lr": lr} for group, lr in zip(groups, rates, strict=True)],
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
        >>> optimiser = fused(torch.optim.SGD, [[weight]], rate=0.5)
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

"""The bilevel architecture search, for every relaxation, objective and sampling scheme.

Each step makes one Adam step on α with ℓ_val + w_01 · ℓ_01, on images that ω is not trained on, and
then one SGD step on ω with ℓ_train (Liu et al. 2019; T21). The self-supervised objectives read
images alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssnas import losses
from ssnas.config.schema import Search, Views
from ssnas.data.sampling import draw_batches
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.metrics import knn_accuracy
from ssnas.networks.bilateral import backbone_rate, build_supernet
from ssnas.networks.space import CELL_KINDS, EDGES
from ssnas.networks.supernet import Supernet, frozen_statistics
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import autocast, generator, seed_everything
from ssnas.runtime.distributed import active, average_gradients
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.objectives import Bilateral, Draws, Images, SelfSupervised, supervised
from ssnas.training.optimizer import Descent, fused, set_rate, without_gradients
from ssnas.training.trainer import GeneratorState, Loop

ALPHA_BETAS = (0.5, 0.999)
DECIDED = (0.15, 0.85)
PERTURBATION = 0.01
HALVES, ORDER, VIEWS = range(3)

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Found:
    """The searched supernet, one row of figures an epoch, every w(α) by epoch, and the seconds."""

    supernet: Supernet
    history: list[dict[str, Any]]
    alphas: list[dict[str, Any]]
    seconds: float


class Bilevel:
    """One step of the bilevel problem, and everything that it changes.

    Args:
        supernet: on the device.
        objective: see `ssnas.training.objectives`.
        config: optimisers and weights of the losses.
    """

    def __init__(self, supernet: Supernet, objective: nn.Module, config: Search) -> None:
        self.supernet, self.objective, self.config = supernet, objective, config
        self.omega = [*supernet.weights(), *objective.parameters()]
        self.alpha = supernet.architecture_parameters()
        self.descent = Descent(self.omega, config)
        self.alpha_optimiser = fused(
            torch.optim.Adam,
            supernet.architecture_groups(),
            config.alpha_learning_rate,
            betas=ALPHA_BETAS,
            weight_decay=config.alpha_weight_decay,
            # Fused, the steps are counted beside the parameters in any case; a capture asks for it.
            capturable=True,
        )

    def state(self) -> dict[str, Any]:
        return {
            "supernet": self.supernet,
            "objective": self.objective,
            "descent": self.descent,
            "alpha_optimiser": self.alpha_optimiser,
        }

    def set_backbone_rate(self, rate: float) -> None:
        """HLS (H24): the backbone's α learn at another rate than the branches' α."""
        set_rate(self.alpha_optimiser, 0, rate)

    def captured(self) -> GraphedStep:
        """`step`, as a CUDA graph where it is of first order, unbranched and in one process.

        The mixing ratio of two branches decides what a step computes at all.
        """
        config = self.config
        plain = config.second_order or config.sampling == "bilateral" or active()
        return GraphedStep(self.step, enabled=not plain)

    def step(self, epoch: int | Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        """A step on α, then one on ω.

        Args:
            drawn: what the objective draws for the images of α, then what it draws for those of ω.
        """
        half = len(drawn) // 2
        validation, training = (
            partial(self.objective, self.supernet, part, epoch)
            for part in (drawn[:half], drawn[half:])
        )
        figures = self.step_alpha(validation, training if self.config.second_order else None)
        return figures | self.step_omega(training)

    def step_alpha(self, validation: Loss, training: Loss | None = None) -> dict[str, Tensor]:
        """One Adam step on α; batch statistics of these images are not recorded.

        Of first order, ∇_α ℓ_val(ω, α), unless `training` is given: see `_unroll`.
        """
        with frozen_statistics(self.supernet), frozen_statistics(self.objective):
            if training is None:
                with without_gradients(self.omega):
                    value, zero_one = self._validate(validation)
            else:
                value, zero_one = self._unroll(validation, training)
        average_gradients(self.alpha)
        self.alpha_optimiser.step()
        return {"loss_alpha": value.detach(), "loss_zero_one": zero_one.detach()}

    def _validate(self, validation: Loss) -> tuple[Tensor, Tensor]:
        value, zero_one = validation(), self.zero_one()
        self.alpha_optimiser.zero_grad()
        (value + self.config.zero_one_weight * zero_one).backward()
        return value, zero_one

    def _unroll(self, validation: Loss, training: Loss) -> tuple[Tensor, Tensor]:
        """The gradient of second order (Liu et al. 2019, equations 7 and 8), left in α's `grad`.

        ∇_α ℓ_val(ω', α) − ξ ∇²_{α,ω} ℓ_train(ω, α) ∇_{ω'} ℓ_val(ω', α), where ω' is ω after one
        step of its own optimiser but for the clipping, ξ that optimiser's rate, and the product of
        the second derivative with v = ∇_{ω'} ℓ_val a central difference:
        (∇_α ℓ_train(ω⁺) − ∇_α ℓ_train(ω⁻)) / 2ε, ω^± = ω ± ε v, ε = 0.01 / ‖v‖.
        Under mixed precision the difference is no better than bfloat16.
        """
        rate = self.descent.learning_rate
        before = [weight.detach().clone() for weight in self.omega]
        with without_gradients(self.alpha):
            self.descent.optimiser.zero_grad()
            training().backward()
        own = self._averaged_gradients()
        self._move(before, self._momentum_step(own), -rate)
        self.descent.optimiser.zero_grad()
        value, zero_one = self._validate(validation)
        direction = self._averaged_gradients()
        norm = torch.stack([g.norm() for g in direction if g is not None]).norm()
        epsilon = PERTURBATION / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        products = []
        with without_gradients(self.omega):
            for sign in (1, -1):
                self._move(before, direction, sign * epsilon)
                products.append(torch.autograd.grad(training(), self.alpha))
        self._move(before, [None] * len(before), 0.0)
        for alpha, plus, minus in zip(self.alpha, *products, strict=True):
            alpha.grad -= rate * (plus - minus) / (2 * epsilon)
        return value, zero_one

    def _averaged_gradients(self) -> list[Tensor | None]:
        """ω's gradients, the same in every process."""
        average_gradients(self.omega)
        return [weight.grad for weight in self.omega]

    def _momentum_step(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """What SGD with momentum and weight decay would subtract, over its rate."""
        steps = []
        for weight, gradient in zip(self.omega, gradients, strict=True):
            if gradient is None:
                steps.append(None)
                continue
            step = gradient + self.config.weight_decay * weight.detach()
            buffer = self.descent.optimiser.state[weight].get("momentum_buffer")
            steps.append(step if buffer is None else step + self.config.momentum * buffer)
        return steps

    @torch.no_grad()
    def _move(self, start: list[Tensor], along: list[Tensor | None], by: float | Tensor) -> None:
        """ω ← start + by · along."""
        for weight, origin, direction in zip(self.omega, start, along, strict=True):
            weight.copy_(origin if direction is None else origin + by * direction)

    def step_omega(self, training: Loss) -> dict[str, Tensor]:
        """One SGD step on ω."""
        with without_gradients(self.alpha):
            value = training()
            self.descent.step(value)
        return {"loss_weights": value.detach()}

    def zero_one(self) -> Tensor:
        """ℓ_01 over all σ(α); nothing under the softmax, whose weights compete already."""
        if self.supernet.relaxation == "softmax":
            return self.alpha[0].new_zeros(())
        weights = torch.cat([w.flatten() for w in self.supernet.architecture().values()])
        return losses.zero_one(weights, self.config.zero_one_norm)


class AlphaLog:
    """Every w(α) after every epoch, as rows of a long table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, epoch: int, supernet: Supernet) -> None:
        for kind, weights in supernet.architecture().items():
            for (source, target), row in zip(EDGES, weights.tolist(), strict=True):
                self.rows += [
                    {
                        "epoch": epoch,
                        "cell": kind,
                        "edge": f"{source}->{target}",
                        "op": op,
                        "weight": weight,
                    }
                    for op, weight in zip(supernet.ops, row, strict=True)
                ]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


def search(
    images: Images,
    config: Search,
    view_settings: Views,
    seed: int,
    monitor: Callable[[Supernet], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Found:
    """Search an architecture for these images.

    A share `omega_share` of the images, drawn once, drives ω, the rest α. The last, short batch of
    an epoch is dropped, since the self-supervised losses use batch statistics.

    Args:
        monitor: a figure to watch, computed every `knn_every` epochs; the search ignores it.

    Raises:
        InputError: for too few images, losses that are not finite, or an objective or sampling
            scheme that these labels do not allow.
    """
    device = images.pixels.device
    seed_everything(seed)
    supernet, objective = _build(images, config, view_settings)
    bilevel = Bilevel(supernet.to(device), objective.to(device), config)
    captured = bilevel.captured()
    order = generator(torch.device("cpu"), seed, ORDER)
    draws = Draws(objective, images, seed, VIEWS)
    parts = _parts(len(images.pixels), config, seed)
    labels = None if images.labels is None else images.labels.cpu()
    alphas = AlphaLog()

    def rate_of_backbone(epoch: int) -> float:
        factor = backbone_rate(objective.ratio(epoch)) if config.heterogeneous else 1
        return config.alpha_learning_rate * factor

    def start_epoch() -> Tensor:
        bilevel.set_backbone_rate(rate_of_backbone(loop.epoch))
        return draw_batches(parts, config.sampling, config.batch_size, order, labels)

    def step(batch: Tensor) -> dict[str, Tensor]:
        of_alpha, of_omega = draws.of(loop.batches, loop.epoch, loop.done)
        return captured(loop.epoch, *of_alpha, *of_omega)

    def finish_epoch(epoch: int) -> dict[str, Any]:
        alphas.add(epoch, supernet)
        row = {"learning_rate": bilevel.descent.learning_rate, **_decisions(supernet)}
        if isinstance(objective, Bilateral):
            row["mixing_ratio"] = objective.ratio(epoch - 1)
            row["backbone_rate"] = rate_of_backbone(epoch - 1)
        if monitor and config.knn_every and epoch % config.knn_every == 0:
            row["knn_accuracy"] = monitor(supernet)
        bilevel.descent.finish_epoch()
        return row

    loop = Loop(
        "search",
        config.epochs,
        {**bilevel.state(), "alphas": alphas, "order": GeneratorState(order)},
        start_epoch,
        step,
        finish_epoch,
        checkpoint,
    )
    history = loop.run()
    return Found(supernet, history, alphas.rows, loop.seconds)


def _build(images: Images, config: Search, view_settings: Views) -> tuple[Supernet, nn.Module]:
    """The supernet and its objective.

    Raises:
        InputError: if they need other labels, or go with another sampling scheme.
    """
    by_labels = config.objective == "supervised"
    if by_labels and (images.labels is None or images.labels.ndim != 1):
        raise InputError(
            "search.objective: 'supervised' needs one label an image; choose from "
            "barlow-twins, nt-xent"
        )
    if not by_labels and config.sampling != "instance":
        raise InputError(
            f"search.sampling: found {config.sampling!r}, which reads labels, with objective "
            f"{config.objective!r}; accepted is instance, or objective supervised"
        )
    if config.heterogeneous and config.sampling != "bilateral":
        raise InputError(
            f"search.heterogeneous: found true with sampling {config.sampling!r}; accepted is "
            "sampling bilateral, whose mixing ratio scales the rate"
        )
    if config.second_order and config.sampling == "bilateral":
        raise InputError(
            "search.second_order: found true with sampling bilateral, one of whose branches has no "
            "gradient at mixing ratios 0 and 1; accepted is false"
        )
    in_channels = images.pixels.shape[-1]
    supernet = build_supernet(config, in_channels, images.num_classes if by_labels else None)
    if by_labels:
        return supernet, supervised(losses.make_loss("ce"), config)
    return supernet, SelfSupervised(config, view_settings, supernet.out_features)


def _parts(count: int, config: Search, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images of α and of those of ω, disjoint."""
    # 40 · (1 − 0.8) comes out as 7.999999999999998.
    sizes = [int(count * share + 1e-6) for share in (1 - config.omega_share, config.omega_share)]
    if min(sizes) < config.batch_size:
        raise InputError(
            f"search.batch_size: found {config.batch_size}, but of the {count} training images "
            f"{sizes[0]} drive α and {sizes[1]} ω; accepted is at most {min(sizes)}"
        )
    permutation = torch.randperm(count, generator=generator(torch.device("cpu"), seed, HALVES))
    return permutation[: sizes[0]], permutation[sizes[0] : sum(sizes)]


def _decisions(supernet: Supernet) -> dict[str, float]:
    """How many edges prefer the skip connection, and which share of all w(α) is near 0 or 1."""
    architecture = {kind: w.detach() for kind, w in supernet.architecture().items()}
    skip = supernet.ops.index("skip_connect")
    row: dict[str, float] = {
        f"skip_{kind}": int((architecture[kind].argmax(dim=1) == skip).sum()) for kind in CELL_KINDS
    }
    weights = torch.cat([w.flatten() for w in architecture.values()])
    low, high = DECIDED
    row["decided"] = float(((weights < low) | (weights > high)).float().mean())
    return row


@torch.no_grad()
def encode(supernet: Supernet, images: Tensor, normalise: Normalise, batch: int = 256) -> Tensor:
    """Features (N, out_features) of uint8 images (N, H, W, C), without augmentation."""
    training = supernet.training
    supernet.eval()
    try:
        parts = []
        for chunk in images.split(batch):
            with autocast(images.device):
                features = supernet.features(normalise(chunk), supernet.architecture())
            parts.append(features.float())
        return torch.cat(parts)
    finally:
        supernet.train(training)


def knn_monitor(train: Images, val: Images) -> Callable[[Supernet], float]:
    """k-nearest-neighbour accuracy on labelled validation images."""

    def monitor(supernet: Supernet) -> float:
        features = [encode(supernet, part.pixels, part.normalise) for part in (train, val)]
        return knn_accuracy(features[0], train.labels, features[1], val.labels)

    return monitor

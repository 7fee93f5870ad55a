"""The bilevel architecture search.

    min_α ℓ_val(ω*(α), α) + w_01 ℓ_01(α)   with   ω*(α) = argmin_ω ℓ_train(ω, α)

(Liu et al. 2019; T21). `Bilevel` takes in turn one Adam step on α (`Bilevel.step_alpha`) and one
SGD step on ω (`Bilevel.step_omega`), on disjoint parts of the training images. ℓ_val and ℓ_train
are one and the same loss on the images of α and on those of ω: the search's objective, by default
Barlow Twins between two random views, which reads no label (`ssnas.training.objectives`).

`search` repeats the step for all epochs. It is the same for every relaxation of the supernet, every
objective and every sampling scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssnas import losses
from ssnas.config.recipes import alpha_and_omega, shaped, sized
from ssnas.config.schema import Search, Views
from ssnas.errors import InputError
from ssnas.networks.bilateral import backbone_rate, build_supernet
from ssnas.networks.supernet import Supernet, frozen_statistics
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import generator, seed_everything
from ssnas.runtime.distributed import active, agreed, average_gradients
from ssnas.training.batches import BatchStream
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingImages
from ssnas.training.monitor import AlphaLog, GenotypeWatch, decisions
from ssnas.training.objectives import (
    SELF_SUPERVISED_LOSSES,
    Bilateral,
    Objective,
    SelfSupervised,
    supervised,
)
from ssnas.training.optimizer import Descent, fused, set_rate, without_gradients
from ssnas.training.trainer import Stateful, Trainer, seconds_a_step

ALPHA_BETAS = (0.5, 0.999)
ALPHA_TRAVEL = 8.6
"""How far Adam may move an α in the published search: 28,700 steps of 0.0003."""

PERTURBATION = 0.01
HALVES, ORDER, VIEWS = range(3)
"""The search's random streams, see `ssnas.runtime.device.generator`."""

Loss = Callable[[], Tensor]
"""The objective on fixed inputs, computed with ω and α as they are at the time of the call."""


class Bilevel:
    """One step of the bilevel problem, and everything that it changes.

    Args:
        supernet: on the device; its parameters are α and ω.
        objective: ℓ; its own parameters, those of a projector, belong to ω.
        config: optimisers and weights of the losses.
        steps: of an epoch.

    Attributes:
        alpha: α, the architecture's parameters.
        omega: ω, all other weights.
        alpha_rate: the learning rate of α, see `alpha_rate`.
    """

    def __init__(
        self, supernet: Supernet, objective: Objective, config: Search, steps: int = 1
    ) -> None:
        self.supernet, self.objective, self.config = supernet, objective, config
        self.alpha = supernet.architecture_parameters()
        self.omega = [*supernet.weights(), *objective.parameters()]
        self.omega_optimiser = Descent(self.omega, config, steps)
        self.alpha_rate = alpha_rate(config, steps)
        self.alpha_optimiser = fused(
            torch.optim.Adam,
            [{"params": group} for group in supernet.architecture_groups()],
            self.alpha_rate,
            betas=ALPHA_BETAS,
            weight_decay=config.alpha_weight_decay,
            # A fused Adam counts its steps on the device anyway, but recording asks for the flag.
            capturable=True,
        )

    def step(self, epoch: int | Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        """Take one step on α, then one on ω.

        Args:
            epoch: from 0.
            inputs: the objective's inputs for the images of α, then those for the images of ω.

        Returns:
            `loss_alpha` (ℓ_val), `loss_zero_one` (ℓ_01) and `loss_weights` (ℓ_train), each of them
            before its own step.
        """
        half = len(inputs) // 2
        val_loss = partial(self.objective, self.supernet, inputs[:half], epoch)
        train_loss = partial(self.objective, self.supernet, inputs[half:], epoch)
        figures = self.step_alpha(val_loss, train_loss if self.config.second_order else None)
        return figures | self.step_omega(train_loss)

    def step_alpha(self, val_loss: Loss, train_loss: Loss | None = None) -> dict[str, Tensor]:
        """Take one Adam step on α along the gradient of ℓ_val + w_01 ℓ_01.

        ω stays as it is, and batch norms do not record the statistics of these images.

        Args:
            val_loss: ℓ_val, on images that ω is not trained on.
            train_loss: ℓ_train for the gradient of second order, where ω is one step ahead; without
                it the gradient is of first order, ∇_α ℓ_val(ω, α).
        """
        with frozen_statistics(self.supernet), frozen_statistics(self.objective):
            if train_loss is None:
                with without_gradients(self.omega):
                    value, zero_one = self._backward_val_loss(val_loss)
            else:
                value, zero_one = self._backward_second_order(val_loss, train_loss)
        average_gradients(self.alpha)
        self.alpha_optimiser.step()
        return {"loss_alpha": value.detach(), "loss_zero_one": zero_one.detach()}

    def step_omega(self, train_loss: Loss) -> dict[str, Tensor]:
        """Take one SGD step on ω along the gradient of ℓ_train; α stays as it is."""
        with without_gradients(self.alpha):
            value = train_loss()
            self.omega_optimiser.step(value)
        return {"loss_weights": value.detach()}

    def zero_one(self) -> Tensor:
        """ℓ_01 of all σ(α), which drives them towards 0 and 1 (Chu et al. 2020).

        It is 0 under the softmax, whose weights compete already.
        """
        if self.supernet.relaxation == "softmax":
            return self.alpha[0].new_zeros(())
        weights = torch.cat([w.flatten() for w in self.supernet.architecture().values()])
        return losses.zero_one(weights, self.config.zero_one_norm)

    def _backward_val_loss(self, val_loss: Loss) -> tuple[Tensor, Tensor]:
        """Back-propagate ℓ_val + w_01 ℓ_01, and return ℓ_val and ℓ_01."""
        value, zero_one = val_loss(), self.zero_one()
        self.alpha_optimiser.zero_grad()
        (value + self.config.zero_one_weight * zero_one).backward()
        return value, zero_one

    def _backward_second_order(self, val_loss: Loss, train_loss: Loss) -> tuple[Tensor, Tensor]:
        """Leave the gradient of second order in α's `grad` (Liu et al. 2019, equations 7 and 8).

        ∇_α ℓ_val(ω', α) − ξ ∇²_{α,ω} ℓ_train(ω, α) ∇_{ω'} ℓ_val(ω', α), where ω' is ω after one
        step of its own optimiser but for the clipping, ξ that optimiser's rate, and the product of
        the second derivative with v = ∇_{ω'} ℓ_val a central difference:
        (∇_α ℓ_train(ω⁺) − ∇_α ℓ_train(ω⁻)) / 2ε, ω^± = ω ± ε v, ε = 0.01 / ‖v‖.
        Under mixed precision the difference is no better than bfloat16.
        """
        rate, sgd = self.omega_optimiser.learning_rate, self.omega_optimiser.optimiser
        start = [weight.detach().clone() for weight in self.omega]
        with without_gradients(self.alpha):
            sgd.zero_grad()
            train_loss().backward()
        self._move_omega(start, self._momentum_step(self._omega_gradients()), -rate)
        sgd.zero_grad()
        value, zero_one = self._backward_val_loss(val_loss)
        direction = self._omega_gradients()
        norm = torch.stack([g.norm() for g in direction if g is not None]).norm()
        epsilon = PERTURBATION / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        perturbed = []
        with without_gradients(self.omega):
            for sign in (1, -1):
                self._move_omega(start, direction, sign * epsilon)
                perturbed.append(torch.autograd.grad(train_loss(), self.alpha))
        self._move_omega(start, [None] * len(start), 0.0)
        for alpha, plus, minus in zip(self.alpha, *perturbed, strict=True):
            assert alpha.grad is not None
            alpha.grad -= rate * (plus - minus) / (2 * epsilon)
        return value, zero_one

    def _omega_gradients(self) -> list[Tensor | None]:
        """The gradients of ω, the same in every process."""
        average_gradients(self.omega)
        return [weight.grad for weight in self.omega]

    def _momentum_step(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The step of SGD with momentum and weight decay for these gradients, over its rate."""
        steps: list[Tensor | None] = []
        for weight, gradient in zip(self.omega, gradients, strict=True):
            if gradient is None:
                steps.append(None)
                continue
            step = gradient + self.config.weight_decay * weight.detach()
            buffer = self.omega_optimiser.optimiser.state[weight].get("momentum_buffer")
            steps.append(step if buffer is None else step + self.config.momentum * buffer)
        return steps

    @torch.no_grad()
    def _move_omega(
        self, start: list[Tensor], directions: list[Tensor | None], length: float | Tensor
    ) -> None:
        """Set ω to start + length · direction."""
        for weight, origin, direction in zip(self.omega, start, directions, strict=True):
            weight.copy_(origin if direction is None else origin + length * direction)

    def set_backbone_rate(self, rate: float) -> None:
        """Set the learning rate of the backbone's α apart from the branches' (HLS, H24)."""
        set_rate(self.alpha_optimiser, 0, rate)

    def step_omega_alone(self, epoch: int | Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        """Take a step on ω, for as long as α waits; arguments and result as of `step`."""
        of_omega = inputs[len(inputs) // 2 :]
        return self.step_omega(partial(self.objective, self.supernet, of_omega, epoch))

    def graphed(self, step: Callable[..., dict[str, Tensor]]) -> GraphedStep:
        """Give a step as a CUDA graph, if it is of first order, unbranched and in one process.

        A step of second order reads its learning rate as a number, and the mixing ratio of two
        branches decides which of them a step computes at all.
        """
        config = self.config
        plain = config.second_order or config.sampling == "bilateral" or active()
        return GraphedStep(step, enabled=not plain)

    def state(self) -> dict[str, Stateful]:
        """All that a step changes, by name, for the checkpoint."""
        return {
            "supernet": self.supernet,
            "objective": self.objective,
            "descent": self.omega_optimiser,
            "alpha_optimiser": self.alpha_optimiser,
        }


@dataclass(frozen=True)
class SearchResult:
    """The end of a search.

    Attributes:
        supernet: with the searched α and ω.
        history: one row of figures an epoch.
        alphas: every w(α) after every epoch, see `ssnas.training.monitor.AlphaLog`.
        seconds: that the search took.
    """

    supernet: Supernet
    history: list[dict[str, Any]]
    alphas: list[dict[str, Any]]
    seconds: float


def search(
    images: TrainingImages,
    config: Search,
    view_settings: Views,
    seed: int,
    monitor: Callable[[Supernet], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> SearchResult:
    """Search an architecture for these images.

    A share `omega_share` of the images, drawn once, drives ω, and the rest α. The last, short batch
    of an epoch is dropped, since the self-supervised losses use batch statistics.

    Args:
        images: on the device that searches. Without labels for the self-supervised objectives,
            which read none.
        config: the supernet, the objective and the optimisers.
        view_settings: the random views of the self-supervised objectives.
        seed: of all random streams.
        monitor: a figure of the supernet to show every `knn_every` epochs, for instance
            `ssnas.training.monitor.knn_monitor`; the search does not use it.
        checkpoint: to resume from and to save to.

    Raises:
        InputError: for too few images, losses that are not finite, or an objective or sampling
            scheme that these labels do not allow.

    Example:
        One epoch on eight random images gives weights of the operations on 14 edges:

        >>> from ssnas.data.views import Normalise
        >>> pixels = torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8)
        >>> images = TrainingImages(pixels, Normalise.of(pixels.numpy()), flip=True)
        >>> settings = Search(channels=2, epochs=1, batch_size=4, projector=4)
        >>> result = search(images, settings, Views(), seed=0)
        >>> {kind: len(weights) for kind, weights in result.supernet.architecture().items()}
        {'normal': 14, 'reduce': 14}
        >>> sorted(result.history[0])[1:5]
        ['decided', 'epoch', 'images_per_second', 'learning_rate']
    """
    device = images.pixels.device
    config = shaped(config, len(images.pixels), images.pixels.shape[1])
    config = sized(config, len(images.pixels))
    seed_everything(seed)
    supernet, objective = _build(images, config, view_settings)
    halves = _alpha_and_omega_images(len(images.pixels), config, seed)
    stream = BatchStream(objective, images, config, (seed, ORDER), (seed, VIEWS), halves)
    bilevel = Bilevel(supernet.to(device), objective.to(device), config, stream.steps)
    both_step, omega_step = bilevel.graphed(bilevel.step), bilevel.graphed(bilevel.step_omega_alone)
    alphas, watch = AlphaLog(), GenotypeWatch()

    def backbone_alpha_rate(epoch: int) -> float:
        rate = bilevel.alpha_rate
        if config.heterogeneous and isinstance(objective, Bilateral):
            rate *= backbone_rate(objective.ratio(epoch))
        return rate

    def start_epoch() -> Tensor:
        bilevel.set_backbone_rate(backbone_alpha_rate(trainer.epoch))
        return stream.draw_epoch()

    def step(batches: Tensor, epoch: int, number: int) -> dict[str, Tensor]:
        of_alpha, of_omega = stream.inputs(batches, epoch, number)
        bilevel.omega_optimiser.schedule(epoch, number)
        chosen = omega_step if epoch < waiting_epochs(config) else both_step
        return chosen(epoch, *of_alpha, *of_omega)

    def finish_epoch(epoch: int) -> dict[str, Any]:
        alphas.add(epoch, supernet)
        row = {"learning_rate": bilevel.omega_optimiser.learning_rate, **decisions(supernet)}
        if isinstance(objective, Bilateral):
            row["mixing_ratio"] = objective.ratio(epoch - 1)
            row["backbone_rate"] = backbone_alpha_rate(epoch - 1)
        if monitor and config.knn_every and epoch % config.knn_every == 0:
            row["knn_accuracy"] = monitor(supernet)
        row["changed_edges"] = watch.look(supernet)
        if config.early_stop and epoch > waiting_epochs(config):
            row["stop"] = agreed(watch.unchanged >= config.early_stop)
        return row

    state = {**bilevel.state(), "alphas": alphas, "order": stream, "decisions": watch}
    trainer = Trainer("search", config.epochs, state, start_epoch, step, finish_epoch, checkpoint)
    history = trainer.run()
    return SearchResult(supernet, history, alphas.rows, trainer.seconds)


def epoch_seconds(images: TrainingImages, config: Search, view_settings: Views) -> float:
    """Measure how long an epoch of `search` takes, by a few steps; arguments as of `search`."""
    config = shaped(config, len(images.pixels), images.pixels.shape[1])
    config = sized(config, len(images.pixels))
    seed_everything(0)
    supernet, objective = _build(images, config, view_settings)
    halves = _alpha_and_omega_images(len(images.pixels), config, 0)
    stream = BatchStream(objective, images, config, (0, ORDER), (0, VIEWS), halves)
    device = images.pixels.device
    bilevel = Bilevel(supernet.to(device), objective.to(device), config, stream.steps)
    batches = stream.draw_epoch()

    def step(number: int) -> None:
        of_alpha, of_omega = stream.inputs(batches, 0, number)
        bilevel.step(0, *of_alpha, *of_omega)

    return stream.steps * seconds_a_step(step, stream.steps)


def waiting_epochs(config: Search) -> int:
    """The number of epochs at the start in which α waits for ω.

    Example:
        >>> waiting_epochs(Search(epochs=30, alpha_warm_up=0.3))
        9
    """
    return min(round(config.alpha_warm_up * config.epochs), config.epochs)


def alpha_rate(config: Search, steps: int) -> float:
    """The learning rate of α: `alpha_learning_rate`, or else `ALPHA_TRAVEL` over α's steps.

    Adam moves an α by at most about its rate a step, whatever the gradient's scale. The rate times
    the number of steps is how far α can come, and so whether it can decide at all.

    Args:
        config: of the search.
        steps: of an epoch.

    Example:
        The published search of 100 epochs of 287 steps, and one of 10 epochs:

        >>> round(alpha_rate(Search(epochs=100), 287), 6)
        0.0003
        >>> round(alpha_rate(Search(epochs=10, alpha_learning_rate=None), 287), 6)
        0.002997
    """
    if config.alpha_learning_rate is not None:
        return config.alpha_learning_rate
    return ALPHA_TRAVEL / max(1, steps * (config.epochs - waiting_epochs(config)))


def _build(
    images: TrainingImages, config: Search, view_settings: Views
) -> tuple[Supernet, Objective]:
    """Build the supernet and the objective that its ω and α are trained by.

    Raises:
        InputError: for options that do not go together, or labels that they do not allow.
    """
    _check_options(images, config)
    height, width, in_channels = images.pixels.shape[1:]
    shape = (height, width, in_channels)
    if config.objective == "supervised":
        supernet = build_supernet(config, shape, images.num_classes)
        return supernet, supervised(losses.make_loss("ce"), config)
    supernet = build_supernet(config, shape, None)
    # Barlow Twins, unless `config.objective` names another loss.
    return supernet, SelfSupervised(config, view_settings, supernet.out_features)


def _check_options(images: TrainingImages, config: Search) -> None:
    by_labels = config.objective == "supervised"
    if by_labels and (images.labels is None or images.labels.ndim != 1):
        raise InputError(
            "search.objective: 'supervised' needs one label an image; choose from "
            f"{', '.join(SELF_SUPERVISED_LOSSES)}"
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
    if config.second_order and config.optimiser != "sgd":
        raise InputError(
            f"search.second_order: found true with optimiser {config.optimiser!r}; accepted is "
            "optimiser sgd, whose step the gradient of second order takes ahead"
        )
    if config.second_order and config.sampling == "bilateral":
        raise InputError(
            "search.second_order: found true with sampling bilateral, one of whose branches has no "
            "gradient at mixing ratios 0 and 1; accepted is false"
        )


def _alpha_and_omega_images(count: int, config: Search, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the indices of the images of α and of those of ω, disjoint.

    Raises:
        InputError: if there are fewer images of either than a batch has.
    """
    sizes = alpha_and_omega(count, config.omega_share)
    if min(sizes) < 2 <= count // 2:
        raise InputError(
            f"search.omega_share: found {config.omega_share:g}, by which of the {count} training "
            f"images {sizes[0]} drive α and {sizes[1]} ω; accepted is what leaves both at least 2"
        )
    if min(sizes) < config.batch_size:
        raise InputError(
            f"search.batch_size: found {config.batch_size}, but of the {count} training images "
            f"{sizes[0]} drive α and {sizes[1]} ω; accepted is at most {min(sizes)}"
        )
    permutation = torch.randperm(count, generator=generator(torch.device("cpu"), seed, HALVES))
    return permutation[: sizes[0]], permutation[sizes[0] : sum(sizes)]

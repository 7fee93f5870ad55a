"""Losses: one pure function each, and the table of the supervised ones by name.

Every loss returns a scalar tensor on the device of its input. Half-precision inputs are raised to
float32 first; float64 stays float64. Supervised losses take `logits` (N, C) and `targets`, either
class indices (N,) or multi-hot rows (N, L) with C = L.

To add a supervised loss, write its function here and give it a line in `LOSSES`. With a line in
`ssnas.decision.SCORES` too, its networks decide under any class prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssnas.errors import InputError
from ssnas.runtime.device import constant

EFFECTIVE_NUMBER_BETA = 0.9999
"""β of the class-balanced weights (Cui et al. 2019), which deferred re-weighting shares."""

MAX_MARGIN, LDAM_SCALE = 0.5, 30.0
"""The margin of the smallest class and the inverse temperature (Cao et al. 2019)."""

ZERO_ONE_NORMS = {"l2": torch.square, "l1": torch.abs}


# Self-supervised losses


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Compute the cross-correlation matrix of two views' embeddings.

    Both are standardised along the batch as a batch norm without affine parameters does (biased
    variance, ε = 1e-5), then C = z_aᵀ z_b / N. The product is computed outside autocast, which
    would round it to half precision. Distributed training averages C over its processes.

    Args:
        z_a: embeddings (N, D) of one view of each image.
        z_b: embeddings (N, D) of another view of the same images.

    Returns:
        C, of shape (D, D).

    Raises:
        InputError: for a batch of one, whose standard deviation is zero.

    Example:
        >>> z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        >>> cross_correlation(z, z.flip(1)).round(decimals=2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if len(z_a) < 2:
        raise InputError(f"batch of {len(z_a)}: Barlow Twins standardises over at least 2 images")
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (F.batch_norm(_float(z), None, None, training=True) for z in (z_a, z_b))
        return z_a.T @ z_b / len(z_a)


def barlow_twins(z_a: Tensor, z_b: Tensor, lambd: float = 0.005) -> Tensor:
    """Compute the Barlow Twins loss (Zbontar et al. 2021).

    ℓ = Σ_i (1 − C_ii)² + λ Σ_i Σ_{j≠i} C_ij², with C from `cross_correlation`.

    Args:
        z_a: embeddings (N, D) of one view of each image.
        z_b: embeddings (N, D) of another view of the same images.
        lambd: λ, the weight of the redundancy term.

    Raises:
        InputError: for a batch of one.

    Example:
        Embeddings that swap their two coordinates have C_ii = 0 and C_ij = 1:

        >>> z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        >>> round(barlow_twins(z, z.flip(1)).item(), 2)
        2.01
    """
    correlation = cross_correlation(z_a, z_b)
    diagonal = correlation.diagonal()
    off_diagonal = correlation - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + lambd * off_diagonal.square().sum()


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float = 0.5) -> Tensor:
    """Compute the NT-Xent loss of SimCLR (Chen et al. 2020).

    ℓ = mean over the 2N views i, with j the other view of the same image, of
    −log( exp(s_ij / T) / Σ_{k≠i} exp(s_ik / T) ), s the cosine similarity and T the temperature.

    Args:
        z_a: embeddings (N, D) of one view of each image.
        z_b: embeddings (N, D) of another view of the same images.
        temperature: T, above 0.

    Example:
        Two images with orthogonal embeddings give log(1 + 2 e⁻²) for each view:

        >>> z = torch.eye(2)
        >>> round(nt_xent(z, z, temperature=0.5).item(), 4)
        0.2395
    """
    n = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):
        z = F.normalize(_float(torch.cat([z_a, z_b])), dim=1)
        similarity = z @ z.T / temperature
    same_view = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity.masked_fill(same_view, -torch.inf), other_view)


# The architecture weights' loss


def zero_one(weights: Tensor, norm: str = "l2") -> Tensor:
    """Compute the zero-one loss (Chu et al. 2020, FairDARTS) of sigmoid architecture weights.

    `l2`: −(1/N) Σ (w_i − ½)², least (−¼) where every weight is 0 or 1.
    `l1`: −(1/N) Σ |w_i − ½|, least (−½) there.

    Args:
        weights: N numbers in [0, 1], of any shape.
        norm: a key of `ZERO_ONE_NORMS`.

    Raises:
        InputError: for another `norm`.

    Example:
        >>> round(zero_one(torch.tensor([0.0, 1.0, 0.5, 0.5])).item(), 4)
        -0.125
    """
    if norm not in ZERO_ONE_NORMS:
        raise InputError(f"norm: found {norm!r}; accepted: {', '.join(ZERO_ONE_NORMS)}")
    return -ZERO_ONE_NORMS[norm](_float(weights) - 0.5).mean()


# Supervised losses


def adjust_logits(
    logits: Tensor,
    priors: Tensor | Sequence[float],
    tau: float = 1.0,
    *,
    multi_label: bool = False,
) -> Tensor:
    """Adjust logits by the class priors (Menon et al. 2021); for use inside the loss only.

    f_y + τ log π_y, or f_l + τ log(π_l / (1 − π_l)) for multi-label data.

    Args:
        logits: f, of shape (N, C).
        priors: π, of shape (C,): the training frequency of each class, adding up to 1, or that of
            each label's positives.
        tau: τ, the strength.
        multi_label: whether each logit is a label of its own.

    Raises:
        InputError: naming the class whose frequency is 0 (or 1, multi-label).

    Example:
        >>> adjust_logits(torch.zeros(1, 2), [0.8, 0.2])
        tensor([[-0.2231, -1.6094]])
    """
    logits = _float(logits)
    return logits + tau * prior_logits(priors, multi_label).to(logits)


def prior_logits(priors: Tensor | Sequence[float], multi_label: bool) -> Tensor:
    """Compute log π (C,), or log(π / (1 − π)) for multi-label data, in float64.

    Raises:
        InputError: naming the class whose frequency is 0 (or 1, multi-label).

    Example:
        >>> prior_logits([0.8, 0.2], multi_label=True)
        tensor([ 1.3863, -1.3863], dtype=torch.float64)
    """
    frequencies = torch.as_tensor(priors, dtype=torch.float64)
    positive = frequencies > 0
    defined = positive & (frequencies < 1) if multi_label else positive
    if not defined.all():
        index = int(defined.logical_not().nonzero()[0])
        accepted = "above 0 and below 1" if multi_label else "above 0"
        raise InputError(
            f"logit adjustment: class {index} has the training frequency "
            f"{frequencies[index].item():g}; accepted: {accepted}"
        )
    return frequencies.logit() if multi_label else frequencies.log()


def focal(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | float | None = None,
) -> Tensor:
    """Compute the focal loss (Lin et al. 2017), FL = −α_t (1 − p_t)^γ log p_t.

    For class indices, p_t is the softmax probability of the true class, and the mean is over the
    N samples. For multi-hot rows, p_t = σ(f) for a positive label and 1 − σ(f) for a negative one,
    and the mean is over samples and labels. With γ = 0 and no `alpha` it is the cross-entropy.

    Args:
        logits: f, of shape (N, C).
        targets: class indices (N,) or multi-hot rows (N, L).
        gamma: γ, at least 0: how strongly certain predictions are discounted.
        alpha: None (α_t = 1); for class indices a tensor (C,) of class weights; for multi-hot
            rows a number or tensor (L,) in [0, 1], where α_t = α for a positive label and 1 − α
            for a negative one.

    Example:
        Equal logits give p_t = ½, so (½)² log 2:

        >>> round(focal(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.1733
    """
    logits = _float(logits)
    weights = None if alpha is None else torch.as_tensor(alpha).to(logits)
    # (1 − p_t)^γ goes through log(1 − p_t), so that neither it nor its gradient overflows where
    # p_t rounds to 0 or 1.
    if targets.ndim == 1:
        index = targets.unsqueeze(1)
        log_probabilities = logits.log_softmax(dim=1)
        log_p = log_probabilities.gather(1, index).squeeze(1)
        log_not_p = log_probabilities.scatter(1, index, -torch.inf).logsumexp(dim=1)
        alpha_t = 1.0 if weights is None else weights[targets]
    else:
        positive = targets.bool()
        signed = torch.where(positive, logits, -logits)
        log_p, log_not_p = F.logsigmoid(signed), F.logsigmoid(-signed)
        alpha_t = 1.0 if weights is None else torch.where(positive, weights, 1 - weights)
    return -(alpha_t * (gamma * log_not_p).exp() * log_p).mean()


def ldam(
    logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[int],
    max_margin: float = MAX_MARGIN,
    scale: float = LDAM_SCALE,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the label-distribution-aware margin loss (Cao et al. 2019).

    The cross-entropy of s · (f_c − Δ_c [c = y]) with Δ_c = K / n_c^¼, where K makes the largest
    margin `max_margin`. The paper's logits are cosines, from a normalised linear layer.

    Args:
        logits: f, of shape (N, C).
        targets: class indices y, of shape (N,).
        class_counts: n, the training images of each of the C classes.
        max_margin: the margin of the smallest class.
        scale: s, the inverse temperature.
        weight: None or class weights (C,), such as those of `drw_weights`.

    Raises:
        InputError: naming a class without images.

    Example:
        Against 16 images of class 0, the one image of class 1 gets the whole margin of ½, and the
        loss is log(1 + √e):

        >>> round(ldam(torch.zeros(1, 2), torch.tensor([1]), [16, 1], scale=1.0).item(), 4)
        0.9741
    """
    logits = _float(logits)
    margins = constant(ldam_margins(class_counts, max_margin), logits)
    shifted = logits - margins * _multi_hot(targets, logits)
    weight = None if weight is None else weight.to(logits)
    return F.cross_entropy(scale * shifted, targets, weight=weight)


def ldam_margins(class_counts: Sequence[int], max_margin: float) -> tuple[float, ...]:
    """Compute the margins Δ_c = K / n_c^¼ of `ldam`, the largest of which is `max_margin`.

    Raises:
        InputError: naming a class without images.

    Example:
        >>> ldam_margins([16, 1], max_margin=0.5)
        (0.25, 0.5)
    """
    counts = _positive_counts(class_counts)
    return tuple(max_margin * (min(counts) / count) ** 0.25 for count in counts)


def class_balanced_weights(class_counts: Sequence[int], beta: float) -> Tensor:
    """Compute class weights by the effective number of samples (Cui et al. 2019).

    w_c ∝ (1 − β) / (1 − β^{n_c}), scaled to add up to C; β = 0 weighs all classes alike.

    Args:
        class_counts: n, the training images of each of the C classes.
        beta: β, in [0, 1).

    Returns:
        w, of shape (C,) and dtype float32.

    Raises:
        InputError: for β outside [0, 1), or naming a class without images.

    Example:
        Weights in the ratio 1 : ⅔ that add up to 2:

        >>> class_balanced_weights([1, 2], beta=0.5)
        tensor([1.2000, 0.8000])
    """
    return torch.tensor(_class_balanced(class_counts, beta), dtype=torch.float32)


def _class_balanced(class_counts: Sequence[int], beta: float) -> tuple[float, ...]:
    if not 0 <= beta < 1:
        raise InputError(f"beta: found {beta}; accepted: 0 <= beta < 1")
    weights = [(1 - beta) / (1 - beta**count) for count in _positive_counts(class_counts)]
    return tuple(weight * len(weights) / sum(weights) for weight in weights)


def drw_weights(
    class_counts: Sequence[int], epoch: int, epochs: int, beta: float = EFFECTIVE_NUMBER_BETA
) -> Tensor:
    """Compute the class weights of an epoch under deferred re-weighting (Cao et al. 2019).

    Ones at first, `class_balanced_weights` in the last fifth of the training.

    Args:
        class_counts: the training images of each of the C classes.
        epoch: the current epoch, counted from 0.
        epochs: the length of the training.
        beta: β of the class-balanced weights, in [0, 1).

    Returns:
        Weights of shape (C,) and dtype float32.

    Raises:
        InputError: for β outside [0, 1), or naming a class without images.

    Example:
        >>> drw_weights([1, 2], epoch=7, epochs=10, beta=0.5)
        tensor([1., 1.])
        >>> drw_weights([1, 2], epoch=8, epochs=10, beta=0.5)
        tensor([1.2000, 0.8000])
    """
    return class_balanced_weights(class_counts, 0.0 if _unweighted(epoch, epochs) else beta)


def _unweighted(epoch: int | Tensor, epochs: int) -> bool | Tensor:
    """Tell whether deferred re-weighting has not yet set in."""
    return 5 * epoch < 4 * epochs


def class_balanced_sigmoid(
    logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[int],
    beta: float = EFFECTIVE_NUMBER_BETA,
) -> Tensor:
    """Compute the class-balanced sigmoid cross-entropy (Cui et al. 2019), BSGM; SGM with β = 0.

    ℓ = −w_y Σ_c log σ(±f_c), + for the true class and − for the others, with w from
    `class_balanced_weights`; the mean is over the samples.

    Args:
        logits: f, of shape (N, C).
        targets: class indices y (N,), or rows (N, C), where the weights of a row's classes add up.
        class_counts: the training images of each of the C classes.
        beta: β of the class-balanced weights, in [0, 1).

    Raises:
        InputError: for β outside [0, 1), or naming a class without images.

    Example:
        Zero logits cost log 2 in each of 2 classes, and the weight of class 0 is 1.2:

        >>> loss = class_balanced_sigmoid(torch.zeros(1, 2), torch.tensor([0]), [1, 2], beta=0.5)
        >>> round(loss.item(), 4)
        1.6636
    """
    logits = _float(logits)
    weights = constant(_class_balanced(class_counts, beta), logits)
    sample_weights = (_multi_hot(targets, logits) * weights).sum(dim=1)
    return (sample_weights * _sigmoid_cross_entropy(logits, targets)).mean()


# The supervised losses by name

Criterion = Callable[[Tensor, Tensor, "int | Tensor"], Tensor]
"""A function (logits, targets, epoch) to a loss.

Epochs count from 0. What a criterion needs besides its arguments is kept on their device, so that
the step may be captured (`ssnas.runtime.cuda_graph`); the epoch may then be a tensor on it.
"""


@dataclass(frozen=True)
class Settings:
    """The training data and settings from which a criterion is made; see `make_loss`."""

    class_counts: Sequence[int]
    num_images: int
    multi_label: bool
    gamma: float
    tau: float
    epochs: int

    @property
    def frequencies(self) -> list[float]:
        """π: the share of each class, or of the images with each label."""
        total = self.num_images if self.multi_label else sum(self.class_counts)
        return [count / total for count in self.class_counts]


@dataclass(frozen=True)
class Loss:
    """A supervised loss that `make_loss` makes by name.

    Attributes:
        make: makes its criterion, whose logits are float32 or float64.
        multi_label: whether it is defined where an image has several labels.
        needs_counts: whether it reads the class counts.
    """

    make: Callable[[Settings], Criterion]
    multi_label: bool = True
    needs_counts: bool = False


def _make_cross_entropy(settings: Settings) -> Criterion:
    return lambda logits, targets, epoch: _cross_entropy(logits, targets)


def _make_focal(settings: Settings) -> Criterion:
    return lambda logits, targets, epoch: focal(logits, targets, settings.gamma)


def _make_ldam_drw(settings: Settings) -> Criterion:
    counts, epochs = settings.class_counts, settings.epochs
    ones, balanced = (_class_balanced(counts, beta) for beta in (0.0, EFFECTIVE_NUMBER_BETA))

    def ldam_drw(logits: Tensor, targets: Tensor, epoch: int | Tensor) -> Tensor:
        unweighted = torch.as_tensor(_unweighted(epoch, epochs), device=logits.device)
        weight = torch.where(unweighted, constant(ones, logits), constant(balanced, logits))
        return ldam(logits, targets, counts, weight=weight)

    return ldam_drw


def _make_sigmoid(settings: Settings) -> Criterion:
    return lambda logits, targets, epoch: _sigmoid_cross_entropy(logits, targets).mean()


def _make_balanced_sigmoid(settings: Settings) -> Criterion:
    counts = _positive_counts(settings.class_counts)
    return lambda logits, targets, epoch: class_balanced_sigmoid(logits, targets, counts)


def _logit_adjusted(make: Callable[[Settings], Criterion]) -> Callable[[Settings], Criterion]:
    """Add logit adjustment to a loss."""

    def make_adjusted(settings: Settings) -> Criterion:
        criterion = make(settings)
        priors = prior_logits(settings.frequencies, settings.multi_label)
        shift = tuple((settings.tau * priors).tolist())
        return lambda logits, targets, epoch: criterion(
            logits + constant(shift, logits), targets, epoch
        )

    return make_adjusted


LOSSES: dict[str, Loss] = {
    "ce": Loss(_make_cross_entropy),
    "ce+la": Loss(_logit_adjusted(_make_cross_entropy), needs_counts=True),
    "focal": Loss(_make_focal),
    "focal+la": Loss(_logit_adjusted(_make_focal), needs_counts=True),
    "ldam-drw": Loss(_make_ldam_drw, multi_label=False, needs_counts=True),
    "sigmoid": Loss(_make_sigmoid),
    "balanced-sigmoid": Loss(_make_balanced_sigmoid, multi_label=False, needs_counts=True),
}


def make_loss(
    name: str,
    class_counts: Sequence[int] = (),
    *,
    num_images: int = 0,
    multi_label: bool = False,
    gamma: float = 2.0,
    tau: float = 1.0,
    epochs: int = 1,
) -> Criterion:
    """Make the supervised criterion `name`, a function (logits, targets, epoch).

    For multi-label data `ce` is the binary cross-entropy, meaned over samples and labels, whereas
    `sigmoid` adds up the labels of a sample.

    Args:
        name: a key of `LOSSES`; `+la` means with logit adjustment.
        class_counts: the training images of each class, or each label's positives. The losses
            `ce`, `focal` and `sigmoid` do not read them.
        num_images: how many training images there are.
        multi_label: whether an image may have several labels.
        gamma: γ of the focal loss.
        tau: τ of logit adjustment.
        epochs: the length of the training; `ldam-drw` re-weights in its last fifth.

    Raises:
        InputError: for an unknown name, a loss that multi-label data does not define, missing
            counts, or a class whose count leaves the loss undefined.

    Example:
        Logit adjustment makes equal logits predict the training frequencies 0.8 and 0.2, so the
        rarer class costs −log 0.2:

        >>> criterion = make_loss("ce+la", [8, 2], num_images=10)
        >>> round(criterion(torch.zeros(1, 2), torch.tensor([1]), 0).item(), 4)
        1.6094
    """
    accepted = [key for key, loss in LOSSES.items() if loss.multi_label or not multi_label]
    if name not in accepted:
        data = "multi-label" if multi_label else "single-label"
        raise InputError(f"loss: found {name!r}; accepted on {data} data: {', '.join(accepted)}")
    loss = LOSSES[name]
    if loss.needs_counts and not (class_counts and num_images):
        without_counts = [key for key, loss in LOSSES.items() if not loss.needs_counts]
        raise InputError(
            f"class_counts: found {list(class_counts)} of {num_images} images; accepted with loss "
            f"{name!r}: a count for each class; without counts {', '.join(without_counts)}"
        )
    criterion = loss.make(Settings(class_counts, num_images, multi_label, gamma, tau, epochs))
    return lambda logits, targets, epoch: criterion(_float(logits), targets, epoch)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _multi_hot(targets: Tensor, logits: Tensor) -> Tensor:
    """Bring `targets` into the shape (N, C), dtype and device of `logits`."""
    if targets.ndim == 1:
        # `one_hot` would make an accelerator wait: it looks at the values of its input.
        targets = targets.unsqueeze(1) == torch.arange(logits.shape[1], device=targets.device)
    return targets.to(logits)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits))


def _sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute each sample's sigmoid cross-entropy (N,), added up over the classes."""
    targets = _multi_hot(targets, logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


def _positive_counts(class_counts: Sequence[int]) -> Sequence[int]:
    for index, count in enumerate(class_counts):
        if count <= 0:
            raise InputError(
                f"class_counts: class {index} has {count} images; accepted: at least 1"
            )
    return class_counts

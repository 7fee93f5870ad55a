"""Losses: one pure function each, and the supervised criterion by its name.

Every loss returns a scalar tensor on the device of its input. Half-precision inputs are raised to
float32 first; float64 stays float64. Supervised losses take `targets` of shape (N,) as class
indices or (N, L) as multi-hot rows.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssnas.errors import InputError
from ssnas.runtime.device import constant

LOSSES = ("ce", "ce+la", "focal", "focal+la", "ldam-drw", "sigmoid", "balanced-sigmoid")
_SINGLE_LABEL = ("ldam-drw", "balanced-sigmoid")
_WITHOUT_COUNTS = ("ce", "focal", "sigmoid")
_DRW_BETA = 0.9999


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Cross-correlation (D, D) of two batches of embeddings, each (N, D).

    Both are standardised along the batch as a batch norm without affine parameters does (biased
    variance, eps = 1e-5), then C = z_aᵀ z_b / N. It is computed outside autocast, so that the
    product is not rounded to half precision. Distributed code may average C over its processes.

    Raises `InputError` for a batch of one, whose standard deviation is zero.
    """
    if len(z_a) < 2:
        raise InputError(f"batch of {len(z_a)}: Barlow Twins standardises over at least 2 images")
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (F.batch_norm(_float(z), None, None, training=True) for z in (z_a, z_b))
        return z_a.T @ z_b / len(z_a)


def barlow_twins(z_a: Tensor, z_b: Tensor, lambd: float = 0.005) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021) of two views' embeddings, each (N, D).

    ℓ = Σ_i (1 − C_ii)² + λ Σ_i Σ_{j≠i} C_ij², with C from `cross_correlation`.

    Raises `InputError` for a batch of one.
    """
    correlation = cross_correlation(z_a, z_b)
    diagonal = correlation.diagonal()
    off_diagonal = correlation - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + lambd * off_diagonal.square().sum()


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020) for two views' embeddings, each (N, D).

    ℓ = mean over the 2N views i, with j the other view of the same image, of
    −log( exp(s_ij / T) / Σ_{k≠i} exp(s_ik / T) ), s the cosine similarity and T the temperature.
    """
    n = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):
        z = F.normalize(_float(torch.cat([z_a, z_b])), dim=1)
        similarity = z @ z.T / temperature
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), other_view)


def zero_one(weights: Tensor, norm: str = "l2") -> Tensor:
    """Zero-one loss (Chu et al. 2020, FairDARTS) of N sigmoid weights in [0, 1], of any shape.

    `l2`: −(1/N) Σ (w_i − ½)², least (−¼) where every weight is 0 or 1.
    `l1`: −(1/N) Σ |w_i − ½|, least (−½) there.

    Raises `InputError` for another `norm`.
    """
    if norm not in ZERO_ONE_NORMS:
        raise InputError(f"norm: found {norm!r}; accepted: {', '.join(ZERO_ONE_NORMS)}")
    return -ZERO_ONE_NORMS[norm](_float(weights) - 0.5).mean()


ZERO_ONE_NORMS = {"l2": torch.square, "l1": torch.abs}


def adjust_logits(
    logits: Tensor,
    priors: Tensor | Sequence[float],
    tau: float = 1.0,
    *,
    multi_label: bool = False,
) -> Tensor:
    """Logit adjustment (Menon et al. 2021) of logits (N, C); use it inside the loss only.

    f_y + τ log π_y, or f_l + τ log(π_l / (1 − π_l)) for multi-label data, where `priors` (C,) are
    the training frequencies: of classes, adding up to 1, or of each label's positives.

    Raises `InputError` naming the class whose frequency is 0 (or 1, multi-label).
    """
    logits = _float(logits)
    return logits + tau * _prior_logits(priors, multi_label).to(logits)


def focal(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | float | None = None,
) -> Tensor:
    """Focal loss (Lin et al. 2017), FL = −α_t (1 − p_t)^γ log p_t.

    `targets` (N,): p_t is the softmax probability of the true class, the mean is over the N
    samples, and `alpha` is None (α_t = 1) or a tensor (C,) of class weights.
    `targets` (N, L): p_t = σ(f) for a positive label and 1 − σ(f) for a negative one, the mean is
    over samples and labels, and `alpha` is None or a scalar or tensor (L,) in [0, 1] that weighs
    positives by α and negatives by 1 − α.

    With γ = 0 and no `alpha` it is the cross-entropy.
    """
    logits = _float(logits)
    if alpha is not None:
        alpha = torch.as_tensor(alpha).to(logits)
    # (1 − p_t)^γ goes through log(1 − p_t), so that neither it nor its gradient overflows where
    # p_t rounds to 0 or 1.
    if targets.ndim == 1:
        index = targets.unsqueeze(1)
        log_probabilities = logits.log_softmax(dim=1)
        log_p = log_probabilities.gather(1, index).squeeze(1)
        log_not_p = log_probabilities.scatter(1, index, -torch.inf).logsumexp(dim=1)
        alpha_t = 1.0 if alpha is None else alpha[targets]
    else:
        signed = torch.where(targets.bool(), logits, -logits)
        log_p, log_not_p = F.logsigmoid(signed), F.logsigmoid(-signed)
        alpha_t = 1.0 if alpha is None else torch.where(targets.bool(), alpha, 1 - alpha)
    return -(alpha_t * (gamma * log_not_p).exp() * log_p).mean()


def ldam(
    logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[int],
    max_margin: float = 0.5,
    scale: float = 30.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al. 2019) for logits (N, C), targets (N,).

    The cross-entropy of s · (f_c − Δ_c [c = y]) with Δ_c = K / n_c^¼, K such that the largest
    margin is `max_margin`, and s = `scale`. The paper's logits are cosines, from a normalised
    linear layer. `weight` (C,) weighs the classes, as `drw_weights` gives them.

    Raises `InputError` naming a class without images.
    """
    logits = _float(logits)
    counts = _positive_counts(class_counts)
    margins = tuple(max_margin * (min(counts) / count) ** 0.25 for count in counts)
    shifted = logits - constant(margins, logits) * _multi_hot(targets, logits)
    weight = None if weight is None else weight.to(logits)
    return F.cross_entropy(scale * shifted, targets, weight=weight)


def class_balanced_weights(class_counts: Sequence[int], beta: float) -> Tensor:
    """Class weights (C,) by the effective number of samples (Cui et al. 2019), float32.

    w_c ∝ (1 − β) / (1 − β^{n_c}), scaled to add up to C; β = 0 weighs all classes alike.

    Raises `InputError` for β outside [0, 1) or naming a class without images.
    """
    return torch.tensor(_class_balanced(class_counts, beta), dtype=torch.float32)


def _class_balanced(class_counts: Sequence[int], beta: float) -> tuple[float, ...]:
    if not 0 <= beta < 1:
        raise InputError(f"beta: found {beta}; accepted: 0 <= beta < 1")
    weights = [(1 - beta) / (1 - beta**count) for count in _positive_counts(class_counts)]
    return tuple(weight * len(weights) / sum(weights) for weight in weights)


def drw_weights(
    class_counts: Sequence[int], epoch: int, epochs: int, beta: float = _DRW_BETA
) -> Tensor:
    """Class weights (C,) under deferred re-weighting (Cao et al. 2019).

    Ones at first, `class_balanced_weights` in the last fifth of the `epochs`; `epoch` counts
    from 0.
    """
    return class_balanced_weights(class_counts, 0.0 if _deferred(epoch, epochs) else beta)


def _deferred(epoch: int | Tensor, epochs: int) -> bool | Tensor:
    return 5 * epoch < 4 * epochs


def class_balanced_sigmoid(
    logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[int],
    beta: float = 0.9999,
) -> Tensor:
    """Class-balanced sigmoid cross-entropy (Cui et al. 2019), BSGM; SGM with β = 0.

    ℓ = −w_y Σ_c log σ(±f_c), + for the true class and − for the others, meaned over the samples,
    with w from `class_balanced_weights`. `targets` are (N,) indices or one-hot rows (N, C); in a
    multi-hot row the weights of its classes add up.

    Raises `InputError` for β outside [0, 1) or naming a class without images.
    """
    logits = _float(logits)
    weights = constant(_class_balanced(class_counts, beta), logits)
    sample_weights = (_multi_hot(targets, logits) * weights).sum(dim=1)
    return (sample_weights * _sigmoid_cross_entropy(logits, targets)).mean()


def make_loss(
    name: str,
    class_counts: Sequence[int] = (),
    *,
    num_images: int = 0,
    multi_label: bool = False,
    gamma: float = 2.0,
    tau: float = 1.0,
    epochs: int = 1,
) -> Callable[[Tensor, Tensor, int | Tensor], Tensor]:
    """The supervised criterion `name`, one of `LOSSES`, as a function (logits, targets, epoch).

    `class_counts` are the training images of each class, or each label's positives among
    `num_images`; `ce`, `focal` and `sigmoid` without logit adjustment read neither. `gamma` is
    focal's, `tau` that of logit adjustment (`+la`), and `epochs` the length of the training, which
    `ldam-drw` re-weights in its last fifth. For multi-label data `ce` is the binary cross-entropy,
    meaned over samples and labels; `sigmoid` adds up the labels.

    What a criterion needs beside its arguments is kept on their device, so that the step may be
    captured (`ssnas.runtime.cuda_graph`); the epoch, which counts from 0, may be a tensor on it.

    Raises `InputError` for an unknown name, for a loss that multi-label data does not define, for
    missing counts, and for a class whose count leaves the loss undefined.
    """
    accepted = [loss for loss in LOSSES if not (multi_label and loss in _SINGLE_LABEL)]
    if name not in accepted:
        data = "multi-label" if multi_label else "single-label"
        raise InputError(f"loss: found {name!r}; accepted on {data} data: {', '.join(accepted)}")
    if name not in _WITHOUT_COUNTS and not (class_counts and num_images):
        raise InputError(
            f"class_counts: found {list(class_counts)} of {num_images} images; accepted with loss "
            f"{name!r}: a count for each class; without counts {', '.join(_WITHOUT_COUNTS)}"
        )
    if name in _SINGLE_LABEL:
        _positive_counts(class_counts)

    def ldam_drw(logits: Tensor, targets: Tensor, epoch: int | Tensor) -> Tensor:
        early, late = (
            constant(_class_balanced(class_counts, beta), logits) for beta in (0.0, _DRW_BETA)
        )
        deferred = torch.as_tensor(_deferred(epoch, epochs), device=logits.device)
        return ldam(logits, targets, class_counts, weight=torch.where(deferred, early, late))

    criterion = {
        "ce": lambda logits, targets, epoch: _cross_entropy(logits, targets),
        "focal": lambda logits, targets, epoch: focal(logits, targets, gamma),
        "ldam-drw": ldam_drw,
        "sigmoid": lambda logits, targets, epoch: _sigmoid_cross_entropy(logits, targets).mean(),
        "balanced-sigmoid": lambda logits, targets, epoch: class_balanced_sigmoid(
            logits, targets, class_counts
        ),
    }[name.removesuffix("+la")]
    if not name.endswith("+la"):
        return lambda logits, targets, epoch: criterion(_float(logits), targets, epoch)

    total = num_images if multi_label else sum(class_counts)
    priors = _prior_logits([count / total for count in class_counts], multi_label)
    shift = tuple((tau * priors).tolist())

    def adjusted(logits: Tensor, targets: Tensor, epoch: int | Tensor) -> Tensor:
        logits = _float(logits)
        return criterion(logits + constant(shift, logits), targets, epoch)

    return adjusted


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _multi_hot(targets: Tensor, logits: Tensor) -> Tensor:
    """`targets` as rows (N, C) like `logits`."""
    if targets.ndim == 1:
        # `one_hot` looks at the values of its input.
        targets = targets.unsqueeze(1) == torch.arange(logits.shape[1], device=targets.device)
    return targets.to(logits)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits))


def _sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid cross-entropy of each sample (N,), added up over the classes."""
    targets = _multi_hot(targets, logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


def _prior_logits(priors: Tensor | Sequence[float], multi_label: bool) -> Tensor:
    """log π (C,), or log(π / (1 − π)) for multi-label data, in float64."""
    priors = torch.as_tensor(priors, dtype=torch.float64)
    defined = (priors > 0) & (priors < 1) if multi_label else priors > 0
    if not defined.all():
        index = int(defined.logical_not().nonzero()[0])
        accepted = "above 0 and below 1" if multi_label else "above 0"
        raise InputError(
            f"logit adjustment: class {index} has the training frequency "
            f"{priors[index].item():g}; accepted: {accepted}"
        )
    return priors.logit() if multi_label else priors.log()


def _positive_counts(class_counts: Sequence[int]) -> Sequence[int]:
    for index, count in enumerate(class_counts):
        if count <= 0:
            raise InputError(
                f"class_counts: class {index} has {count} images; accepted: at least 1"
            )
    return class_counts

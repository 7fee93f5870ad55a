"""From logits to decisions: the posterior that a loss leaves in its logits, and class priors.

A network is trained by some loss on some class frequencies π, and used where others hold. Three
steps lead from its logits f to a decision:

1. Its **scores** z: log P(y | x) under π up to a constant, or the log-odds of each label. Which
   function of f they are follows from the loss, see `SCORES`. Without the prior, z − log π is the
   evidence of the image alone.
2. A **temperature** T divides the evidence, (z − log π) / T: networks are surer than they should be
   (`fit_temperature`).
3. The **prior** ρ of the place of use is added, + log ρ (`log_prior`).

The softmax of the sum, or its sigmoid for multi-label data, are probabilities under ρ. For
multi-label data log π stands for the log-odds of each label.

As published, logit adjustment decides by the softmax of f itself. That is the balanced posterior
for the cross-entropy with τ = 1, and for no other loss: the focal loss is not proper, its minimiser
v is less sure than the posterior, and removing log π from it removes too much (Charoenphakdee et
al. 2021, CVPR, "On Focal Loss for Class-Posterior Probability Estimation").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ssnas import losses
from ssnas.config.decide import DECISIONS, MULTI_LABEL_DECISIONS, check_frequencies
from ssnas.config.recipes import sized
from ssnas.config.schema import Finetune
from ssnas.errors import InputError

MOST_TEMPERATURE = 20.0
FOLDS = 5


# The scores of a loss


def focal_scores(logits: Tensor, gamma: float, *, multi_label: bool = False) -> Tensor:
    """Compute the scores of the focal loss.

    The minimiser v of the expected focal loss, the softmax of the logits, is not the posterior η,
    which is η_i = h(v_i) / Σ_l h(v_l), with h(v) = v / φ(v) and
    φ(v) = (1 − v)^γ − γ (1 − v)^(γ − 1) v log v (Charoenphakdee et al. 2021, Theorem 11). For
    multi-label data each label and its absence are a vector v of two. With γ = 0, η = v.

    Args:
        logits: (N, C), as the loss sees them: adjusted where it adjusts.
        gamma: γ, at least 0.
        multi_label: whether each logit is a label of its own.

    Returns:
        log h (N, C), which is log η up to a constant a row; multi-label, log(η / (1 − η)).

    Example:
        A network under the focal loss that says 0.8 means 0.98:

        >>> focal_scores(torch.tensor([[0.8, 0.2]]).log(), gamma=2).softmax(dim=1).round(decimals=2)
        tensor([[0.9800, 0.0200]])
    """
    if multi_label:
        log_v, log_not_v = F.logsigmoid(logits), F.logsigmoid(-logits)
        return _log_h(log_v, log_not_v, gamma) - _log_h(log_not_v, log_v, gamma)
    log_v = logits.log_softmax(dim=1)
    return _log_h(*_accurate_logs(log_v), gamma)


def _accurate_logs(log_v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log v and log(1 − v) of the probabilities in each row, also where v rounds to 1."""
    v = log_v.exp()
    sure = v > 0.5
    others = log_v.masked_fill(sure, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_not_v = torch.where(sure, others, torch.log1p(-v.clamp(max=0.5)))
    return torch.where(sure, torch.log1p(-others.exp().clamp(max=0.5)), log_v), log_not_v


def _log_h(log_v: Tensor, log_not_v: Tensor, gamma: float) -> Tensor:
    """Compute log h(v): log v − (γ − 1) log(1 − v) − log((1 − v) − γ v log v)."""
    if gamma == 0:
        return log_v
    # The sum is divided by 1 − v first, so that it stays above 0 where 1 − v underflows: there
    # −v log v / (1 − v) is 1.
    ratio = torch.where(log_not_v > -30, -log_v * (log_v - log_not_v).exp(), 1.0)
    return log_v - gamma * log_not_v - torch.log1p(gamma * ratio)


def sigmoid_scores(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the scores (N, C) of sigmoid cross-entropies, one for each of C exclusive classes.

    The minimiser of Σ_c BCE(σ(f_c), [c = y]), weighted by w_y, is
    σ(f_c) = w_c η_c / Σ_k w_k η_k, so that η_c ∝ σ(f_c) / w_c.

    Args:
        logits: (N, C).
        weights: w, of shape (C,), such as the class-balanced ones; None for all alike.

    Example:
        >>> logits = torch.tensor([[0.6, 0.4]]).logit()
        >>> sigmoid_scores(logits, torch.tensor([1.0, 2.0])).softmax(dim=1)
        tensor([[0.7500, 0.2500]])
    """
    scores = F.logsigmoid(logits)
    return scores if weights is None else scores - weights.to(logits).log()


def margin_scores(logits: Tensor, margins: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Compute the scores (N, C) of the label-distribution-aware margin loss (Cao et al. 2019).

    With a = softmax(s f) and m_c = exp(−s Δ_c), the loss of class y is
    w_y (log(1 − a_y (1 − m_y)) − log a_y + s Δ_y). Where the gradient of its expectation is zero,
    w_c η_c ∝ a_c (1 − a_c (1 − m_c)).

    Args:
        logits: cosines f, of shape (N, C).
        margins: Δ, of shape (C,).
        weights: w, of shape (C,).
        scale: s.

    Example:
        Without margins and weights it is the cross-entropy of s f:

        >>> ones = torch.ones(2)
        >>> margin_scores(torch.tensor([[0.1, 0.0]]), 0 * ones, ones, 10.0).softmax(dim=1)
        tensor([[0.7311, 0.2689]])
    """
    log_a, log_not_a = _accurate_logs((scale * logits).log_softmax(dim=1))
    left = torch.logaddexp(log_not_a, log_a - scale * margins.to(logits))
    return log_a + left - weights.to(logits).log()


# The scores by the name of the loss

Scores = Callable[[Tensor], Tensor]
"""A function from logits (N, C) to scores (N, C)."""


def _make_plain(settings: losses.Settings) -> Scores:
    return lambda logits: logits


def _make_focal(settings: losses.Settings) -> Scores:
    return partial(focal_scores, gamma=settings.gamma, multi_label=settings.multi_label)


def _adjusted(make: Callable[[losses.Settings], Scores]) -> Callable[[losses.Settings], Scores]:
    """Give the scores of a loss the logits that it sees, f + τ log π."""

    def make_adjusted(settings: losses.Settings) -> Scores:
        scores = make(settings)
        shift = settings.tau * losses.prior_logits(settings.frequencies, settings.multi_label)
        return lambda logits: scores(logits + shift.to(logits))

    return make_adjusted


def _make_ldam_drw(settings: losses.Settings) -> Scores:
    counts, epochs = settings.class_counts, settings.epochs
    weights = losses.drw_weights(counts, epochs - 1, epochs)
    margins = torch.tensor(losses.ldam_margins(counts, losses.MAX_MARGIN))
    return partial(margin_scores, margins=margins, weights=weights, scale=losses.LDAM_SCALE)


def _make_sigmoid(settings: losses.Settings) -> Scores:
    return _make_plain(settings) if settings.multi_label else sigmoid_scores


def _make_balanced_sigmoid(settings: losses.Settings) -> Scores:
    beta = losses.EFFECTIVE_NUMBER_BETA
    return partial(
        sigmoid_scores, weights=losses.class_balanced_weights(settings.class_counts, beta)
    )


SCORES: dict[str, Callable[[losses.Settings], Scores]] = {
    "ce": _make_plain,
    "ce+la": _adjusted(_make_plain),
    "focal": _make_focal,
    "focal+la": _adjusted(_make_focal),
    "ldam-drw": _make_ldam_drw,
    "sigmoid": _make_sigmoid,
    "balanced-sigmoid": _make_balanced_sigmoid,
}
"""The scores by the name of the loss; one without an entry has its published decision alone."""


# Priors


def posterior(
    logits: ArrayLike,
    train_prior: ArrayLike,
    gamma: float = 0.0,
    tau: float = 0.0,
    multi_label: bool = False,
) -> np.ndarray:
    """Compute P(y | x) under the training frequencies, from logits that a focal loss has trained.

    The loss has seen v = softmax(f + τ log π), whatever τ is, so the posterior is that of
    `focal_scores` at f + τ log π. Multi-label: σ(f + τ log(π / (1 − π))).

    Args:
        logits: f, of shape (N, C).
        train_prior: π, of shape (C,): the training frequency of each class or label.
        gamma: γ of the focal loss; 0 for the cross-entropy.
        tau: τ of the logit adjustment; 0 for none.
        multi_label: whether each logit is a label of its own.

    Returns:
        Probabilities (N, C).

    Example:
        Logit adjustment has learned that equal logits mean the training frequencies:

        >>> posterior([[0.0, 0.0]], [0.8, 0.2], tau=1.0).round(2).tolist()
        [[0.8, 0.2]]
    """
    f = torch.as_tensor(np.asarray(logits, dtype=np.float64))
    if tau:
        f = f + tau * losses.prior_logits(list(np.asarray(train_prior)), multi_label)
    return probabilities(focal_scores(f, gamma, multi_label=multi_label), multi_label).numpy()


def with_prior(
    posterior: ArrayLike,
    train_prior: ArrayLike,
    prior: str | ArrayLike,
    multi_label: bool = False,
) -> np.ndarray:
    """Move a posterior from the training frequencies to another prior.

    p_c ∝ η_c ρ_c / π_c (Saerens et al. 2002); multi-label, the odds of each label likewise.

    Args:
        posterior: η, probabilities (N, C) under π.
        train_prior: π, of shape (C,).
        prior: ρ, of shape (C,); `natural` for π itself, or `balanced` for ρ_c = 1 / C
            (multi-label ½).
        multi_label: whether each column is a label of its own.

    Returns:
        Probabilities (N, C) under ρ.

    Raises:
        InputError: naming `prior`.

    Example:
        >>> with_prior([[0.8, 0.2]], [0.8, 0.2], "balanced").round(4).tolist()
        [[0.5, 0.5]]
    """
    eta = torch.as_tensor(np.asarray(posterior, dtype=np.float64))
    scores = eta.logit() if multi_label else eta.log()
    evidence = scores - log_prior(train_prior, train_prior, multi_label)
    moved = evidence + log_prior(prior, train_prior, multi_label)
    return probabilities(moved, multi_label).numpy()


def log_prior(prior: str | ArrayLike, train_prior: ArrayLike, multi_label: bool) -> Tensor:
    """Compute log ρ, or the log-odds of each label, in float64 (C,).

    A class or label that the training images lack, or a label that all of them have, was never
    learned: it has 0 whatever the prior, so that its score stays as it is.

    Args:
        prior: ρ, of shape (C,), `natural` for π, or `balanced`.
        train_prior: π, of shape (C,).
        multi_label: whether each is a label of its own.

    Raises:
        InputError: naming `prior`.

    Example:
        >>> log_prior("balanced", [0.8, 0.2], multi_label=True)
        tensor([0., 0.], dtype=torch.float64)
    """
    pi = np.asarray(train_prior, dtype=np.float64)
    if isinstance(prior, str):
        if prior not in ("natural", "balanced"):
            raise InputError(
                f"prior: found {prior!r}; accepted: natural, balanced, or {len(pi)} frequencies"
            )
        uniform = np.full(len(pi), 0.5 if multi_label else 1 / len(pi))
        rho = pi if prior == "natural" else uniform
    else:
        rho = check_frequencies(prior, len(pi), multi_label)
    learned = (pi > 0) & (pi < 1) if multi_label else pi > 0
    frequencies = torch.from_numpy(np.where(learned, rho, 0.5 if multi_label else 1.0))
    return frequencies.logit() if multi_label else frequencies.log()


def probabilities(scores: Tensor, multi_label: bool) -> Tensor:
    """Compute the softmax of scores (N, C), or the sigmoid of multi-label scores.

    Example:
        >>> probabilities(torch.zeros(1, 2), multi_label=False)
        tensor([[0.5000, 0.5000]])
    """
    return scores.sigmoid() if multi_label else scores.softmax(dim=1)


# What is fitted on validation images


def fit_temperature(scores: Tensor, targets: np.ndarray, train_prior: ArrayLike) -> float:
    """Fit the temperature T on validation images (Guo et al. 2017).

    It divides the evidence z − log π, not z: a network that knows nothing shall say the prior, not
    that all classes are alike. T minimises the images' log-loss, with targets smoothed by
    ε = 1 / (M + 2) for M predictions: if all of them are right, the next one is wrong with about
    that probability (Laplace's rule of succession; Platt 1999), and not never. T is kept only if
    it lowers the log-loss of images that it was not fitted on, in a cross-validation; else T = 1.
    The images may have other class frequencies than the training images: the probabilities are
    those under their own, in which the training frequencies count as much as one image a class.

    Args:
        scores: z, of shape (N, C).
        targets: class indices (N,) or multi-hot rows (N, C).
        train_prior: π, of shape (C,).

    Returns:
        T, from 1/20 to 20; 1 for fewer than ten images.

    Example:
        Scores that are twice as sure as they should be:

        >>> scores = 2 * torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double().log()
        >>> targets = np.tile([0, 0, 0, 1, 1, 1, 1, 0], 20)
        >>> rows = np.tile([0, 0, 0, 0, 1, 1, 1, 1], 20)
        >>> round(fit_temperature(scores[rows], targets, [0.5, 0.5]), 2)
        2.02
    """
    if len(targets) < 2 * FOLDS:
        return 1.0
    multi_label, pi = targets.ndim == 2, np.asarray(train_prior, dtype=np.float64)
    if multi_label:
        frequencies = (targets.sum(axis=0) + 2 * pi) / (len(targets) + 2)
    else:
        frequencies = np.bincount(targets, minlength=len(pi)) + len(pi) * pi
    evidence = scores.double() - log_prior(pi, pi, multi_label)
    prior = log_prior(frequencies, pi, multi_label)
    labels = torch.from_numpy(targets)

    def log_loss(rows: np.ndarray, temperature: float, smoothed: bool = False) -> float:
        z, wanted = evidence[rows] / temperature + prior, labels[rows]
        share = 1 / (wanted.numel() + 2) if smoothed else 0.0
        if not multi_label:
            return float(F.cross_entropy(z, wanted, label_smoothing=share))
        smooth = (1 - share) * wanted.double() + share * (1 - wanted.double())
        return float(F.binary_cross_entropy_with_logits(z, smooth))

    fold, everything = np.arange(len(targets)) % FOLDS, np.arange(len(targets))
    unfitted, fitted = 0.0, 0.0
    for number in range(FOLDS):
        inside, outside = everything[fold != number], everything[fold == number]
        temperature = _minimise(partial(log_loss, inside, smoothed=True))
        unfitted += log_loss(outside, 1.0) * len(outside)
        fitted += log_loss(outside, temperature) * len(outside)
    if fitted >= unfitted:
        return 1.0
    return _minimise(partial(log_loss, everything, smoothed=True))


def _minimise(log_loss: Callable[[float], float]) -> float:
    from scipy.optimize import minimize_scalar

    most = np.log(MOST_TEMPERATURE)
    least = minimize_scalar(lambda log_t: log_loss(np.exp(log_t)), bounds=(-most, most))
    return float(np.exp(least.x))


def f1_thresholds(probabilities: ArrayLike, targets: np.ndarray) -> list[float]:
    """Choose for each label the threshold with the greatest F1 on validation images.

    A threshold lies halfway between two neighbouring probabilities. Among equal ones it is the one
    that gives the label to the fewest images. A label without positives gets ½.

    Args:
        probabilities: (N, L).
        targets: multi-hot rows (N, L).

    Returns:
        L thresholds in [0, 1].

    Example:
        >>> [round(t, 2) for t in f1_thresholds([[0.1], [0.2], [0.4]], np.array([[0], [1], [1]]))]
        [0.15]
    """
    return [
        _f1_threshold(column, target)
        for column, target in zip(np.asarray(probabilities).T, targets.T, strict=True)
    ]


def _f1_threshold(probability: np.ndarray, target: np.ndarray) -> float:
    if not target.any():
        return 0.5
    order = np.argsort(-probability, kind="stable")
    descending = np.append(probability[order], 0.0)
    hits, labelled = target[order].cumsum(), np.arange(1, len(target) + 1)
    f1 = 2 * hits / (labelled + target.sum())
    # Equal probabilities are on the same side of any threshold.
    f1[descending[:-1] == descending[1:]] = 0
    best = int(f1.argmax())
    return float(descending[best] + descending[best + 1]) / 2


# All of it as one object


@dataclass(frozen=True)
class Decision:
    """The way from a network's logits to probabilities under a prior.

    Attributes:
        scores: of the loss, see `SCORES`.
        frequencies: of the classes or labels among the training images, (C,).
        seen: the frequencies in the batches that the network was trained on: `frequencies`, unless
            another sampler drew them. None where they or the scores are not defined, as with two
            samplers (BBN): only the published decision is left then.
        multi_label: whether each logit is a label of its own.
        temperature: T.
        thresholds: of the decision `f1`, one a label.

    Example:
        >>> decision = Decision(lambda logits: logits, (0.8, 0.2), (0.8, 0.2), multi_label=False)
        >>> logits = torch.tensor([[0.8, 0.2]]).log()
        >>> decision(logits, "balanced")
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
        >>> decision(logits, [0.9, 0.1]).round(decimals=2)
        tensor([[0.9000, 0.1000]], dtype=torch.float64)
    """

    scores: Callable[[Tensor], Tensor]
    frequencies: tuple[float, ...]
    seen: tuple[float, ...] | None
    multi_label: bool
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions that it can make by name."""
        if self.seen is None:
            return ("published",)
        return MULTI_LABEL_DECISIONS if self.thresholds else DECISIONS

    def __call__(self, logits: Tensor, decide: str | Sequence[float]) -> Tensor:
        """Compute probabilities (N, C) in float64 from logits (N, C), see `rule`."""
        return self.rule(decide)(logits)

    def rule(self, decide: str | Sequence[float]) -> Callable[[Tensor], Tensor]:
        """Make the function from logits to probabilities of one decision.

        Args:
            decide: one of `names`, or a prior (C,).

        Raises:
            InputError: naming `decide`.
        """
        if isinstance(decide, str) and decide not in self.names:
            raise InputError(f"decide: found {decide!r}; choose from {', '.join(self.names)}")
        if decide == "published":
            return lambda logits: probabilities(logits.double(), self.multi_label)
        if self.seen is None:
            raise InputError(
                "prior: the loss or the samplers of this network leave no posterior; accepted is "
                "the decision published"
            )
        prior = self.frequencies if decide in ("natural", "f1") else decide
        before = log_prior(self.seen, self.seen, self.multi_label)
        after = log_prior(prior, self.seen, self.multi_label)

        def decided(logits: Tensor) -> Tensor:
            evidence = self.scores(logits.double()) - before.to(logits.device)
            z = evidence / self.temperature + after.to(logits.device)
            return probabilities(z, self.multi_label)

        return decided

    def threshold(self, decide: str | Sequence[float]) -> np.ndarray | float:
        """Return from what probability on a label is given; single-label data have no threshold."""
        return np.array(self.thresholds) if decide == "f1" else 0.5

    def fitted(self, logits: Tensor, targets: np.ndarray) -> Decision:
        """Return it with the temperature and the thresholds that suit validation images.

        Args:
            logits: (N, C) of the validation images.
            targets: class indices (N,) or multi-hot rows (N, C).
        """
        if self.seen is None or not len(targets):
            return self
        temperature = fit_temperature(self.scores(logits.double()), targets, self.seen)
        fitted = replace(self, temperature=temperature)
        if not self.multi_label:
            return fitted
        natural = fitted(logits, "natural").numpy()
        return replace(fitted, thresholds=tuple(f1_thresholds(natural, targets)))


def decision_of(
    config: Finetune, counts: Sequence[int], num_images: int, multi_label: bool
) -> Decision:
    """Make the decision that goes with a training by labels, not yet fitted.

    Args:
        config: its loss, with γ and τ, its sampling and its epochs.
        counts: the training images of each class, or with each label.
        num_images: how many training images there are.
        multi_label: whether an image may have several labels.

    Example:
        >>> decision = decision_of(Finetune(loss="ce+la"), [8, 2], 10, multi_label=False)
        >>> decision(torch.zeros(1, 2), "natural")
        tensor([[0.8000, 0.2000]], dtype=torch.float64)
    """
    config = sized(config, num_images)
    settings = losses.Settings(
        counts, num_images, multi_label, config.gamma, config.tau, config.epochs
    )
    frequencies = tuple(settings.frequencies)
    make = SCORES.get(config.loss)
    batches = {"instance": frequencies, "balanced": (1 / len(counts),) * len(counts)}
    seen = batches.get(config.sampling) if make else None
    scores = make(settings) if make else _make_plain(settings)
    return Decision(scores, frequencies, seen, multi_label)

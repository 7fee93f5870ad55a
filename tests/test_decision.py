"""From logits to probabilities, against minimisers found numerically and posteriors by hand."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, softmax
from scipy.stats import norm

from ssnas import decision
from ssnas.config.decide import MULTI_LABEL_DECISIONS, named_prior
from ssnas.errors import InputError
from ssnas.losses import LOSSES, Settings, make_loss

COUNTS, IMAGES = [700, 250, 50], 1000
PI = np.array(COUNTS) / IMAGES


def minimise(loss, shape):
    """Find the logits with the least loss, in float64."""
    logits = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=5000, tolerance_grad=1e-13, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach()


def expected(criterion, eta, epoch):
    """The mean loss of many images with equal logits, a share η_y of which are of class y."""
    targets = torch.from_numpy(np.repeat(np.arange(len(eta)), np.rint(10_000 * eta).astype(int)))
    return lambda logits: criterion(logits.expand(len(targets), -1), targets, epoch)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gamma, tau", [(2.0, 1.0), (0.5, 0.3), (5.0, 1.7)])
def test_scores_of_the_least_expected_loss_are_the_posterior(name, gamma, tau):
    settings = {"num_images": IMAGES, "gamma": gamma, "tau": tau, "epochs": 10}
    criterion = make_loss(name, COUNTS, **settings)
    eta = np.array([0.55, 0.38, 0.07])
    logits = minimise(expected(criterion, eta, epoch=9), (1, 3))
    scores = decision.SCORES[name](Settings(COUNTS, multi_label=False, **settings))(logits)
    np.testing.assert_allclose(softmax(scores.numpy(), axis=1)[0], eta, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.multi_label])
def test_multi_label_scores_are_the_log_odds(name):
    settings = {"num_images": IMAGES, "multi_label": True, "gamma": 2.0, "tau": 0.8}
    criterion = make_loss(name, COUNTS, **settings)
    eta = np.array([0.6, 0.3, 0.02])
    rows = [np.array(row) for row in itertools.product([0, 1], repeat=3)]

    def loss(logits):
        return sum(
            np.where(row, eta, 1 - eta).prod() * criterion(logits, torch.tensor(row[None]), 0)
            for row in rows
        )

    logits = minimise(loss, (1, 3))
    scores = decision.SCORES[name](Settings(COUNTS, epochs=1, **settings))(logits)
    np.testing.assert_allclose(expit(scores.numpy())[0], eta, atol=2e-5)


def test_a_mixture_of_gaussians():
    """Two classes with densities N(0, 1) and N(2, 1), trained on 9 : 1 with focal + adjustment."""
    train, gamma, tau = np.array([0.9, 0.1]), 2.0, 1.0

    def by_hand(x, prior):
        joint = np.stack([prior[0] * norm.pdf(x), prior[1] * norm.pdf(x, loc=2)], axis=1)
        return joint / joint.sum(axis=1, keepdims=True)

    x = np.linspace(-2, 4, 13)
    criterion = make_loss("focal+la", [900, 100], num_images=1000, gamma=gamma, tau=tau)
    logits = np.concatenate(
        [minimise(expected(criterion, eta, 0), (1, 2)).numpy() for eta in by_hand(x, train)]
    )
    eta = decision.posterior(logits, train, gamma=gamma, tau=tau)
    np.testing.assert_allclose(eta, by_hand(x, train), atol=1e-4)
    balanced = decision.with_prior(eta, train, "balanced")
    np.testing.assert_allclose(balanced, by_hand(x, [0.5, 0.5]), atol=1e-3)
    elsewhere = decision.with_prior(eta, train, [0.3, 0.7])
    np.testing.assert_allclose(elsewhere, by_hand(x, [0.3, 0.7]), atol=1e-3)
    # What the published decision does instead: the boundary is not where the densities are equal.
    published = softmax(logits, axis=1)
    middle = np.flatnonzero(x == 1.0)[0]
    assert balanced[middle, 1] == pytest.approx(0.5, abs=1e-3)
    assert published[middle, 1] > 0.55


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_focus_and_adjustment_nothing_changes(multi_label):
    logits = np.random.default_rng(0).normal(size=(5, 3))
    plain = expit(logits) if multi_label else softmax(logits, axis=1)
    eta = decision.posterior(logits, PI, multi_label=multi_label)
    np.testing.assert_allclose(eta, plain, rtol=1e-12)
    natural = decision.with_prior(eta, PI, "natural", multi_label=multi_label)
    np.testing.assert_allclose(natural, eta, rtol=1e-12)


@pytest.mark.parametrize("multi_label", [False, True])
def test_priors_there_and_back(multi_label):
    eta = decision.posterior(
        np.random.default_rng(0).normal(size=(5, 3)), PI, 2.0, 1.0, multi_label=multi_label
    )
    elsewhere = np.array([0.2, 0.3, 0.5])
    there = decision.with_prior(eta, PI, elsewhere, multi_label=multi_label)
    assert np.abs(there - eta).max() > 0.01
    back = decision.with_prior(there, elsewhere, PI, multi_label=multi_label)
    np.testing.assert_allclose(back, eta, rtol=1e-10)


def test_adjusted_cross_entropy_is_balanced_by_its_own_logits():
    """With γ = 0 and τ = 1 the published decision is the balanced one (Menon et al. 2021)."""
    logits = np.random.default_rng(0).normal(size=(5, 3))
    eta = decision.posterior(logits, PI, tau=1.0)
    balanced = decision.with_prior(eta, PI, "balanced")
    np.testing.assert_allclose(balanced, softmax(logits, axis=1), rtol=1e-10)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_logits_stay_finite_and_in_order(dtype, multi_label):
    certain = torch.tensor([5.0, 20, 80, 800, 5e4], dtype=dtype)
    logits = torch.stack([certain, torch.zeros_like(certain), -certain], dim=1)
    scores = decision.focal_scores(logits, 2.0, multi_label=multi_label)
    assert scores.isfinite().all()
    assert (scores[:, 0] > scores[:, 1]).all() and (scores[:, 1] > scores[:, 2]).all()
    margins = (scores[:, 0] - scores[:, 1]).diff()
    assert (margins > 0).all()


def test_focal_scores_at_equal_logits():
    equal = decision.focal_scores(torch.zeros(1, 2), 2.0).softmax(dim=1)
    torch.testing.assert_close(equal, torch.tensor([[0.5, 0.5]]))


def test_a_class_that_was_never_trained_keeps_its_score():
    eta = np.array([[0.7, 0.3, 1e-9]])
    balanced = decision.with_prior(eta, [0.8, 0.2, 0.0], "balanced")
    assert np.isfinite(balanced).all() and balanced[0, 2] < 1e-6


@pytest.mark.parametrize(
    "prior", ["fair", [0.5, 0.5], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [float("nan"), 1, 1], ["a"]]
)
def test_a_wrong_prior_is_named(prior):
    with pytest.raises(InputError, match="prior: found"):
        decision.with_prior([[0.2, 0.3, 0.5]], PI, prior)


def test_priors_by_class_name():
    assert named_prior({"b": 0.1, "a": 0.9}, ["a", "b"]) == [0.9, 0.1]
    assert named_prior([2, 6], ["a", "b"]) == [0.25, 0.75]
    for wrong in ({"a": 1.0}, {"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 0.5, "d": 0.5}):
        with pytest.raises(InputError, match="a frequency for each of a, b"):
            named_prior(wrong, ["a", "b"])


def test_decisions_by_name_depend_on_the_labels():
    assert named_prior("f1", ["a", "b"], multi_label=True) == "f1"
    with pytest.raises(InputError, match="'f1'; choose from published, balanced, natural"):
        named_prior("f1", ["a", "b"])


def calibrated_scores(images, classes, rng, sharpness=1.0):
    """Scores z of images whose classes are drawn from softmax(z), then sharpened."""
    scores = rng.normal(scale=1.5, size=(images, classes))
    targets = np.array([rng.choice(classes, p=p) for p in softmax(scores, axis=1)])
    return torch.from_numpy(sharpness * scores), targets


def test_the_temperature_takes_back_what_sharpens():
    rng = np.random.default_rng(0)
    scores, targets = calibrated_scores(4000, 4, rng, sharpness=3.0)
    frequencies = np.bincount(targets, minlength=4) / len(targets)
    assert decision.fit_temperature(scores, targets, frequencies) == pytest.approx(3.0, rel=0.1)


def test_a_temperature_that_does_not_help_is_not_kept():
    """Labels that have nothing to do with the scores of 12 images cannot be fitted for others."""
    rng = np.random.default_rng(3)
    kept = 0
    for _ in range(40):
        scores, targets = calibrated_scores(12, 4, rng)
        kept += decision.fit_temperature(scores, targets, np.full(4, 0.25)) != 1.0
    assert 0 < kept < 30


def test_few_images_keep_the_temperature():
    scores, targets = calibrated_scores(9, 2, np.random.default_rng(0), sharpness=3.0)
    assert decision.fit_temperature(scores, targets, [0.5, 0.5]) == 1.0


def test_the_temperature_is_fitted_under_the_images_own_frequencies():
    """Validation images of another prior than the training images': T is still the sharpening's."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=2000), rng.normal(loc=2, size=2000)])
    targets = np.repeat([0, 1], 2000)
    train = np.array([0.95, 0.05])
    log_joint = np.stack([norm.logpdf(x), norm.logpdf(x, loc=2)], axis=1) + np.log(train)
    # Sharpened as the network is: the likelihood alone, and the prior as trained.
    scores = torch.from_numpy(log_joint)
    assert decision.fit_temperature(scores, targets, train) == pytest.approx(1.0, abs=0.06)


def f1(labels, target):
    return 2 * (labels & target).sum() / (labels.sum() + target.sum())


def test_thresholds_have_the_greatest_f1():
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 5)) < [0.5, 0.3, 0.1, 0.05, 0.0]).astype(np.uint8)
    probabilities = np.round(expit(rng.normal(size=(60, 5)) + 2 * targets - 2), 1)  # with ties
    thresholds = decision.f1_thresholds(probabilities, targets)
    assert thresholds[4] == 0.5
    for column, target, threshold in zip(
        probabilities.T, targets.T[:4], thresholds[:4], strict=False
    ):
        target = target.astype(bool)
        best = max(f1(column >= t, target) for t in np.unique(column))
        assert f1(column > threshold, target) == pytest.approx(best)


def decided(seen=(0.9, 0.1), **options):
    return decision.Decision(lambda z: z, (0.9, 0.1), seen, multi_label=False, **options)


def test_class_balanced_batches_have_a_prior_of_their_own():
    """What balanced batches teach is the balanced posterior; the natural one has to be shifted."""
    logits = torch.tensor([[0.6, 0.4]]).log()
    balanced = decided(seen=(0.5, 0.5))
    torch.testing.assert_close(balanced(logits, "balanced").float(), torch.tensor([[0.6, 0.4]]))
    odds = 0.6 / 0.4 * 9
    expected_natural = torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]])
    torch.testing.assert_close(balanced(logits, "natural").float(), expected_natural)


def test_two_samplers_leave_the_published_decision_alone():
    undefined = decided(seen=None)
    assert undefined.names == ("published",)
    with pytest.raises(InputError, match="choose from published"):
        undefined(torch.zeros(1, 2), "balanced")
    with pytest.raises(InputError, match="leave no posterior"):
        undefined(torch.zeros(1, 2), [0.5, 0.5])
    assert undefined.fitted(torch.zeros(20, 2), np.zeros(20, int)) is undefined


def test_the_published_decision_knows_no_temperature():
    logits = torch.tensor([[2.0, 0.0]])
    for temperature in (1.0, 3.0):
        published = decided(temperature=temperature)(logits, "published")
        np.testing.assert_allclose(published, softmax(logits.numpy(), axis=1), rtol=1e-6)


def test_the_temperature_divides_the_evidence_and_not_the_prior():
    logits = torch.tensor([[2.0, 0.0]])
    evidence = logits.numpy() - np.log([0.9, 0.1])
    cooled = decided(temperature=2.0)
    balanced, natural = softmax(evidence / 2, axis=1), softmax(evidence / 2 + np.log([0.9, 0.1]), 1)
    np.testing.assert_allclose(cooled(logits, "balanced"), balanced, rtol=1e-6)
    np.testing.assert_allclose(cooled(logits, "natural"), natural, rtol=1e-6)
    # What knows nothing says the prior.
    np.testing.assert_allclose(decided(temperature=1e9)(logits, "natural"), [[0.9, 0.1]], rtol=1e-6)


def test_fitting_multi_label_data_gives_thresholds():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 2)) - 1
    targets = (rng.random((200, 2)) < expit(scores)).astype(np.uint8)
    pi = tuple(targets.mean(axis=0))
    unfitted = decision.Decision(lambda z: z, pi, pi, multi_label=True)
    fitted = unfitted.fitted(torch.from_numpy(3 * scores), targets)
    assert fitted.temperature == pytest.approx(3, rel=0.4)
    assert fitted.names == MULTI_LABEL_DECISIONS
    natural = fitted(torch.from_numpy(3 * scores), "natural").numpy()
    f1_probabilities = fitted(torch.from_numpy(3 * scores), "f1").numpy()
    np.testing.assert_array_equal(natural, f1_probabilities)
    assert fitted.threshold("f1").tolist() == decision.f1_thresholds(natural, targets)
    balanced = fitted(torch.from_numpy(3 * scores), "balanced").numpy()
    np.testing.assert_allclose(logit(balanced), logit(natural) - logit(pi), rtol=1e-6)

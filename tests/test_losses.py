"""Losses against hand-computed values, peer libraries and invariants."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, NTXentLoss
from torchvision.ops import sigmoid_focal_loss

from ssnas import losses
from ssnas.errors import InputError

# CIFAR-10-LT, imbalance 10.
COUNTS = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
# The four sign patterns of two independent coordinates: zero mean, unit variance, uncorrelated.
SIGNS = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def indices(n, classes, seed=1):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def multi_hot(n, labels, seed=1):
    return torch.randint(2, (n, labels), generator=torch.Generator().manual_seed(seed))


# Self-supervised losses


@pytest.mark.parametrize("lambd", [0.005, 0.1])
def test_barlow_twins_agrees_with_lightly(lambd):
    z_a, z_b = 3 * normal(12, 5) + 1, normal(12, 5, seed=2)
    expected = BarlowTwinsLoss(lambda_param=lambd)(z_a, z_b)
    torch.testing.assert_close(losses.barlow_twins(z_a, z_b, lambd), expected)


@pytest.mark.parametrize(
    ("z_a", "z_b", "expected"),
    [
        (SIGNS, SIGNS, 0.0),  # C = identity
        (SIGNS, 7 * SIGNS + 3, 0.0),  # standardisation undoes scale and shift
        (SIGNS, -SIGNS, 8.0),  # C = -identity: two diagonal terms of 2²
        (SIGNS, SIGNS.flip(1), 2 + 2 * 0.005),  # C = [[0, 1], [1, 0]]
        (SIGNS[[0, 3]], SIGNS[[0, 3]], 2 * 0.005),  # C = all ones
    ],
)
def test_barlow_twins_by_hand(z_a, z_b, expected):
    assert losses.barlow_twins(z_a, z_b).item() == pytest.approx(expected, abs=2e-4)


def test_cross_correlation_is_pearsons():
    z_a, z_b = 5 * normal(30, 3), 5 * normal(30, 3, seed=2)
    pearson = torch.corrcoef(torch.cat([z_a, z_b], dim=1).T)[:3, 3:]
    torch.testing.assert_close(losses.cross_correlation(z_a, z_b), pearson, atol=1e-5, rtol=1e-4)


def test_barlow_twins_refuses_a_batch_of_one():
    with pytest.raises(ValueError, match="batch of 1"):
        losses.barlow_twins(normal(1, 4), normal(1, 4))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_agrees_with_lightly(temperature):
    z_a, z_b = normal(8, 6), normal(8, 6, seed=2)
    expected = NTXentLoss(temperature=temperature)(z_a, z_b)
    torch.testing.assert_close(losses.nt_xent(z_a, z_b, temperature), expected)


def test_nt_xent_by_hand():
    # Cosines: 1 with the other view, 0 with both views of the other image.
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    expected = -math.log(math.e**2 / (math.e**2 + 2))
    assert losses.nt_xent(z, z, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [losses.barlow_twins, losses.nt_xent])
def test_self_supervised_losses_keep_float32_for_half_inputs_and_under_autocast(loss):
    z_a, z_b = normal(16, 8).bfloat16(), normal(16, 8, seed=2).bfloat16()
    expected = loss(z_a.float(), z_b.float())
    torch.testing.assert_close(loss(z_a, z_b), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(z_a.float(), z_b.float()), expected)


# Zero-one loss


@pytest.mark.parametrize(
    ("weights", "l2", "l1"),
    [
        ([0.0, 1.0, 1.0], -0.25, -0.5),
        ([0.5, 0.5], 0.0, 0.0),
        ([[0.9, 0.2], [0.5, 1.0]], -(0.16 + 0.09 + 0 + 0.25) / 4, -(0.4 + 0.3 + 0 + 0.5) / 4),
    ],
)
def test_zero_one_by_hand(weights, l2, l1):
    weights = torch.tensor(weights)
    assert losses.zero_one(weights).item() == pytest.approx(l2)
    assert losses.zero_one(weights, norm="l1").item() == pytest.approx(l1)


def test_zero_one_names_the_accepted_norms():
    with pytest.raises(InputError, match="norm: found 'max'; accepted: l2, l1"):
        losses.zero_one(torch.ones(2), norm="max")


# Logit adjustment


def test_adjust_logits_by_hand():
    logits = torch.tensor([[1.0, 2.0]])
    single = losses.adjust_logits(logits, [0.8, 0.2], tau=2.0)
    expected = [1 + 2 * math.log(0.8), 2 + 2 * math.log(0.2)]
    assert single[0].tolist() == pytest.approx(expected)
    multi = losses.adjust_logits(logits, torch.tensor([0.8, 0.2]), multi_label=True)
    assert multi[0].tolist() == pytest.approx([1 + math.log(4), 2 - math.log(4)])


def test_adjusting_by_uniform_priors_leaves_the_loss():
    logits, targets = normal(6, 4), indices(6, 4)
    adjusted = losses.adjust_logits(logits, [0.25] * 4, tau=1.5)
    torch.testing.assert_close(F.cross_entropy(adjusted, targets), F.cross_entropy(logits, targets))


def test_adjustment_turns_balanced_posteriors_into_the_training_posterior():
    joint = normal(9, 4, dtype=torch.float64).exp()
    joint /= joint.sum()
    priors = joint.sum(dim=0)
    adjusted = losses.adjust_logits((joint / priors).log(), priors)
    posterior = joint / joint.sum(dim=1, keepdim=True)
    torch.testing.assert_close(adjusted.softmax(dim=1), posterior)


@pytest.mark.parametrize(
    ("priors", "multi_label", "index"),
    [([0.5, 0.0, 0.5], False, 1), ([0.1, 0.3, 0.0], True, 2), ([1.0, 0.3, 0.2], True, 0)],
)
def test_adjust_logits_names_the_class_without_a_prior(priors, multi_label, index):
    with pytest.raises(InputError, match=f"class {index} "):
        losses.adjust_logits(torch.zeros(1, 3), priors, multi_label=multi_label)


# Focal loss


def test_focal_by_hand():
    # p_t = 1/2: 0.25 · ln 2; p_t = 1/4 (odds 1 : 3): 0.5625 · ln 4.
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    targets = torch.tensor([1, 0])
    terms = [0.25 * math.log(2), 0.5625 * math.log(4)]
    assert losses.focal(logits, targets).item() == pytest.approx(sum(terms) / 2)
    weighted = losses.focal(logits, targets, alpha=torch.tensor([3.0, 0.5]))
    assert weighted.item() == pytest.approx((0.5 * terms[0] + 3 * terms[1]) / 2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_multi_label_focal_agrees_with_torchvision(gamma, alpha):
    logits, targets = 3 * normal(7, 5), multi_hot(7, 5)
    peer_alpha = -1 if alpha is None else alpha
    expected = sigmoid_focal_loss(
        logits, targets.float(), alpha=peer_alpha, gamma=gamma, reduction="mean"
    )
    torch.testing.assert_close(losses.focal(logits, targets, gamma, alpha), expected)


def test_multi_label_focal_weighs_each_label_by_its_alpha():
    logits, targets, alphas = normal(7, 2), multi_hot(7, 2), torch.tensor([0.1, 0.7])
    columns = [
        losses.focal(logits[:, [i]], targets[:, [i]], alpha=alphas[i].item()) for i in (0, 1)
    ]
    expected = torch.stack(columns).mean()
    torch.testing.assert_close(losses.focal(logits, targets, alpha=alphas), expected)


def test_focal_without_focus_is_cross_entropy():
    logits = normal(9, 4)
    targets, labels = indices(9, 4), multi_hot(9, 4)
    single, multi = losses.focal(logits, targets, gamma=0), losses.focal(logits, labels, gamma=0)
    torch.testing.assert_close(single, F.cross_entropy(logits, targets))
    torch.testing.assert_close(multi, F.binary_cross_entropy_with_logits(logits, labels.float()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.tensor([[1, 0], [0, 1]])])
@pytest.mark.parametrize("sign", [1, -1])
def test_focal_is_finite_where_the_network_is_certain(gamma, targets, sign):
    logits = (sign * torch.tensor([[50.0, -50], [-50, 50]])).requires_grad_()
    loss = losses.focal(logits, targets, gamma)
    loss.backward()
    certain_value = {1: 0.0, -1: 100.0 if targets.ndim == 1 else 50.0}[sign]
    assert loss.item() == pytest.approx(certain_value, abs=1e-6)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().amax() > 0.2 if sign < 0 else logits.grad.abs().amax() < 1e-6


# LDAM, deferred re-weighting and class-balanced losses


@pytest.mark.parametrize(
    ("target", "margin"),
    [
        (9, 0.5),  # the smallest class, 500 images
        (0, 0.5 * 0.1**0.25),  # ten times as many
        (3, 0.5 * (500 / 2320) ** 0.25),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_ldam_subtracts_the_margin_of_the_class(target, margin, scale):
    loss = losses.ldam(torch.zeros(1, 10), torch.tensor([target]), COUNTS, scale=scale)
    # Logits: -sΔ for the true class, 0 for the nine others.
    expected = scale * margin + math.log(math.exp(-scale * margin) + 9)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_ldam_without_margin_is_the_weighted_cross_entropy():
    logits, targets, weight = normal(6, 3), indices(6, 3), torch.tensor([1.0, 2.0, 0.5])
    loss = losses.ldam(logits, targets, [5, 3, 2], max_margin=0.0, scale=2.0, weight=weight)
    torch.testing.assert_close(loss, F.cross_entropy(2 * logits, targets, weight=weight))


def test_class_balanced_weights_by_hand():
    # beta 0.5: 0.5 / (1 - 0.5) = 1 and 0.5 / (1 - 0.25) = 2/3, scaled to add up to 2.
    assert losses.class_balanced_weights([1, 2], 0.5).tolist() == pytest.approx([1.2, 0.8])
    assert losses.class_balanced_weights(COUNTS, 0.0).tolist() == [1.0] * 10
    # beta near 1: inverse frequency.
    inverse = losses.class_balanced_weights([30, 10], 1 - 1e-9)
    assert inverse.tolist() == pytest.approx([0.5, 1.5], rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_class_balanced_weights_refuse_beta(beta):
    with pytest.raises(InputError, match="beta"):
        losses.class_balanced_weights([1, 2], beta)


@pytest.mark.parametrize(("epochs", "switch"), [(200, 160), (10, 8), (7, 6)])
def test_drw_switches_in_the_last_fifth(epochs, switch):
    before = losses.drw_weights(COUNTS, switch - 1, epochs)
    after = losses.drw_weights(COUNTS, switch, epochs)
    assert before.tolist() == [1.0] * 10
    ratio = (1 - 0.9999**5000) / (1 - 0.9999**500)
    assert (after[9] / after[0]).item() == pytest.approx(ratio, rel=1e-5)
    assert after.sum().item() == pytest.approx(10)


def test_class_balanced_sigmoid_by_hand():
    # Zero logits cost ln 2 in each of the 2 classes; the weights are 1.2 and 0.8 as above.
    logits = torch.zeros(3, 2)
    loss = losses.class_balanced_sigmoid(logits, torch.tensor([0, 0, 1]), [1, 2], beta=0.5)
    assert loss.item() == pytest.approx((1.2 + 1.2 + 0.8) / 3 * 2 * math.log(2))


def test_class_balanced_sigmoid_takes_one_hot_rows_and_is_plain_without_beta():
    logits, targets = normal(6, 3), indices(6, 3)
    rows = F.one_hot(targets, 3)
    by_index = losses.class_balanced_sigmoid(logits, targets, [9, 5, 2])
    torch.testing.assert_close(losses.class_balanced_sigmoid(logits, rows, [9, 5, 2]), by_index)
    plain = F.binary_cross_entropy_with_logits(logits, rows.float(), reduction="sum") / 6
    unweighted = losses.class_balanced_sigmoid(logits, targets, [9, 5, 2], beta=0.0)
    torch.testing.assert_close(unweighted, plain)


@pytest.mark.parametrize(
    "loss", [losses.ldam, losses.class_balanced_sigmoid], ids=lambda loss: loss.__name__
)
def test_count_based_losses_name_the_empty_class(loss):
    with pytest.raises(InputError, match="class 1 has 0 images"):
        loss(torch.zeros(2, 3), torch.tensor([0, 2]), [4, 0, 2])


# The criterion by name

NUM_IMAGES = 40
POSITIVES = [20, 8, 4]


def expected_losses(logits, targets, multi_label):
    """Each loss of `make_loss` in terms of functions tested above, in the re-weighted epochs."""
    frequencies = torch.tensor(POSITIVES) / (NUM_IMAGES if multi_label else 32)
    shift = (frequencies / (1 - frequencies)).log() if multi_label else frequencies.log()
    if multi_label:
        cross_entropy = F.binary_cross_entropy_with_logits
        targets = targets.float()
        rows = targets
    else:
        cross_entropy = F.cross_entropy
        rows = F.one_hot(targets, 3).float()
    expected = {
        "ce": cross_entropy(logits, targets),
        "ce+la": cross_entropy(logits + 0.5 * shift, targets),
        "focal": losses.focal(logits, targets, gamma=3.0),
        "focal+la": losses.focal(logits + 0.5 * shift, targets, gamma=3.0),
        "sigmoid": F.binary_cross_entropy_with_logits(logits, rows) * 3,
    }
    if not multi_label:
        weight = losses.class_balanced_weights(POSITIVES, 0.9999)
        expected["ldam-drw"] = losses.ldam(logits, targets, POSITIVES, weight=weight)
        expected["balanced-sigmoid"] = losses.class_balanced_sigmoid(logits, targets, POSITIVES)
    return expected


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_make_loss_gives_each_loss_in_float32(name, multi_label):
    if multi_label and name in ("ldam-drw", "balanced-sigmoid"):
        with pytest.raises(InputError, match=f"loss: found '{name}'.*multi-label.*focal"):
            losses.make_loss(name, POSITIVES, num_images=NUM_IMAGES, multi_label=True)
        return
    logits = normal(8, 3).bfloat16().requires_grad_()
    targets = multi_hot(8, 3).to(torch.uint8) if multi_label else indices(8, 3)
    loss = losses.make_loss(
        name,
        POSITIVES,
        num_images=NUM_IMAGES,
        multi_label=multi_label,
        gamma=3.0,
        tau=0.5,
        epochs=10,
    )(logits, targets, 9)
    expected = expected_losses(logits.detach().float(), targets, multi_label)[name]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_make_loss_defers_the_weights_of_ldam():
    logits, targets = normal(8, 3), indices(8, 3)
    loss = losses.make_loss("ldam-drw", POSITIVES, num_images=32, epochs=10)
    torch.testing.assert_close(loss(logits, targets, 7), losses.ldam(logits, targets, POSITIVES))
    assert loss(logits, targets, 8) != loss(logits, targets, 7)


@pytest.mark.parametrize(
    ("name", "counts", "multi_label", "message"),
    [
        ("hinge", [3, 2], False, "loss: found 'hinge'.*ce, .*balanced-sigmoid"),
        ("ce+la", [3, 0], True, "class 1 has the training frequency 0"),
        ("focal+la", [0, 5], False, "class 0 has the training frequency 0"),
        ("ldam-drw", [3, 0], False, "class 1 has 0 images"),
        ("balanced-sigmoid", [3, 0], False, "class 1 has 0 images"),
    ],
)
def test_make_loss_refuses_before_training(name, counts, multi_label, message):
    with pytest.raises(InputError, match=message):
        losses.make_loss(name, counts, num_images=5, multi_label=multi_label)


# Gradients

Z_B = normal(6, 4, seed=2, dtype=torch.float64)
TARGETS, LABELS = indices(6, 4), multi_hot(6, 4)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.barlow_twins(x, Z_B),
        lambda x: losses.nt_xent(x, Z_B),
        lambda x: losses.zero_one(x.sigmoid(), "l2"),
        lambda x: losses.zero_one(x.sigmoid(), "l1"),
        lambda x: losses.adjust_logits(x, [0.4, 0.3, 0.2, 0.1]),
        lambda x: losses.focal(x, TARGETS, alpha=torch.arange(1.0, 5)),
        lambda x: losses.focal(x, LABELS, alpha=0.3),
        lambda x: losses.ldam(x, TARGETS, [9, 5, 3, 1], weight=torch.arange(1.0, 5)),
        lambda x: losses.class_balanced_sigmoid(x, TARGETS, [9, 5, 3, 1]),
    ],
)
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, normal(6, 4, dtype=torch.float64).requires_grad_())

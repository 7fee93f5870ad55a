"""BBN and HLS: the bilateral supernet against a sum made by hand, schedules against values."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ssnas.errors import InputError
from ssnas.networks.bilateral import (
    BRANCHES,
    SCHEDULES,
    BilateralSupernet,
    backbone_rate,
    bilateral_loss,
    mixing_ratio,
    parabolic,
    reverse_sigmoid,
)
from ssnas.networks.operations import RELAXATIONS

GRID = [i / 1000 for i in range(1, 1000)]
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    """A pool, the identity and a convolution stand for all operations, in a third of the time."""
    few = ("avg_pool_3x3", "skip_connect", "dil_conv_3x3")
    monkeypatch.setitem(RELAXATIONS, "sigmoid", few)
    monkeypatch.setitem(RELAXATIONS, "softmax", ("none", *few))
    torch.manual_seed(0)


def build(num_cells=3, relaxation="softmax"):
    """A float64 supernet of three classes with spread-out α."""
    supernet = BilateralSupernet(2, num_cells, 3, relaxation, 1, num_classes=3).double()
    for alpha in supernet.alphas.values():
        torch.nn.init.normal_(alpha)
    return supernet


def draw(count=4, size=8):
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def evaluated(num_cells=3):
    """A supernet in evaluation mode, with statistics that it recorded in both branches."""
    supernet = build(num_cells)
    with torch.no_grad():
        supernet(draw())
    return supernet.eval()


# Supernet


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize(("num_cells", "size"), [(3, 8), (3, 9), (4, 8)])
def test_a_branch_by_hand(num_cells, size, relaxation, name):
    """After three cells, the last of which halves the resolution, and after four."""
    supernet, x = build(num_cells, relaxation), draw(size=size)
    w = {
        key: alpha.softmax(dim=1) if relaxation == "softmax" else alpha.sigmoid()
        for key, alpha in supernet.alphas.items()
    }
    before_last, last = supernet.stem(x)
    for kind, cell in zip(supernet.kinds, supernet.cells, strict=True):
        output = cell(before_last, last, w[kind])
        before_last, last = last, output
    output = supernet.branches[name](before_last, last, w[name])
    assert output.shape == last.shape
    linear = supernet.classifiers[name]
    logits = output.flatten(2).mean(dim=2) @ linear.weight.T + linear.bias
    assert_close(supernet.branch(x, name), logits)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_branch_has_an_alpha_of_its_own(relaxation):
    supernet = BilateralSupernet(2, 3, 3, relaxation, 1)
    weights = supernet.architecture()
    assert set(weights) == {"normal", "reduce", *BRANCHES}
    for name, alpha in supernet.alphas.items():
        assert alpha.shape == weights[name].shape == (14, len(RELAXATIONS[relaxation]))
        assert 0.0005 < alpha.std() < 0.0015
        assert all(other is alpha or not other.equal(alpha) for other in supernet.alphas.values())


def test_all_parameters_are_grouped_once():
    supernet = build()
    alphas = [*supernet.backbone_alphas(), *supernet.branch_alphas()]
    heads = [*supernet.branches.parameters(), *supernet.classifiers.parameters()]
    weights = [*supernet.backbone_weights(), *heads]
    assert supernet.backbone_alphas() == [supernet.alphas["normal"], supernet.alphas["reduce"]]
    assert supernet.branch_alphas() == [supernet.alphas[name] for name in BRANCHES]
    assert sorted(map(id, weights)) == sorted(map(id, supernet.weights()))
    assert sorted(map(id, [*alphas, *weights])) == sorted(map(id, supernet.parameters()))


@pytest.mark.parametrize(("name", "other"), [BRANCHES, BRANCHES[::-1]])
def test_a_branch_sends_gradients_to_itself_and_to_the_backbone(name, other):
    supernet = build()
    supernet.branch(draw(), name).square().sum().backward()
    for alpha in [*supernet.backbone_alphas(), supernet.alphas[name]]:
        assert alpha.grad.any()
    assert supernet.alphas[other].grad is None
    for group in (supernet.branches, supernet.classifiers):
        assert any(p.grad.any() for p in group[name].parameters())
        assert all(p.grad is None for p in group[other].parameters())
    assert supernet.stem[0].weight.grad.any()


def test_a_mixture_sends_gradients_everywhere():
    supernet = build()
    supernet.mixed(draw(), draw(), 0.3).square().sum().backward()
    assert all(alpha.grad.any() for alpha in supernet.alphas.values())


def test_a_given_architecture_takes_the_place_of_alpha():
    supernet, x = evaluated(), draw()
    own = supernet.architecture()
    for name in BRANCHES:
        assert_close(supernet.branch(x, name, own), supernet.branch(x, name))
        # Without any operation the nodes are zero, and the classifier's bias is left.
        empty = supernet.branch(x, name, {**own, name: 0 * own[name]})
        assert_close(empty, supernet.classifiers[name].bias.expand(4, 3))


# Mixing


@pytest.mark.parametrize("num_cells", [3, 5])
def test_forward_mixes_the_branches(num_cells):
    supernet, x = evaluated(num_cells), draw()
    instance, balanced = (supernet.branch(x, name) for name in BRANCHES)
    assert instance.shape == (4, 3)
    assert (instance - balanced).abs().max() > 1e-3
    assert_close(supernet(x, 1.0), instance)
    assert_close(supernet(x, 0.0), balanced)
    assert_close(supernet(x, 0.25), 0.25 * instance + 0.75 * balanced)
    assert_close(supernet(x), (instance + balanced) / 2)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_mixing_a_batch_with_itself_is_forward(ratio):
    supernet, x = evaluated(), draw()
    assert_close(supernet.mixed(x, x, ratio), supernet(x, ratio))


def test_mixed_batches_keep_their_own_statistics():
    supernet, x_u, x_r = build(), draw(), 3 * draw() + 1
    expected = 0.3 * supernet.branch(x_u, "instance") + 0.7 * supernet.branch(x_r, "balanced")
    assert_close(supernet.mixed(x_u, x_r, 0.3), expected)
    assert (supernet.mixed(x_r, x_u, 0.3) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("forward", "passes"),
    [
        (lambda net, x: net(x, 0.3), (1, 1, 1)),
        (lambda net, x: net(x, 1.0), (1, 1, 0)),
        (lambda net, x: net.mixed(x, x, 0.3), (2, 1, 1)),
        (lambda net, x: net.mixed(x, None, 1.0), (1, 1, 0)),
        (lambda net, x: net.mixed(None, x, 0.0), (1, 0, 1)),
    ],
    ids=["forward", "forward a=1", "mixed", "mixed a=1", "mixed a=0"],
)
def test_passes_through_backbone_and_branches(forward, passes):
    """Whatever has no share is not computed, so it records no statistics either."""
    supernet, calls = build(), []
    stem = supernet.stem[0]
    for module in (stem, *supernet.branches.values()):
        module.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    before = {key: buffer.clone() for key, buffer in supernet.named_buffers()}
    forward(supernet, draw())
    parts = (stem, *(supernet.branches[name] for name in BRANCHES))
    assert tuple(calls.count(part) for part in parts) == passes
    for name, count in zip(BRANCHES, passes[1:], strict=True):
        for key, buffer in supernet.named_buffers():
            if key.startswith(f"branches.{name}.") and key.endswith("running_var"):
                assert buffer.equal(before[key]) is (count == 0)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.25, -0.25 * math.log(0.8) - 0.75 * math.log(0.2)),
        (1.0, -math.log(0.8)),
        (0.0, -math.log(0.2)),
    ],
)
def test_loss_by_hand(ratio, expected):
    logits = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    targets = torch.tensor([0]), torch.tensor([1])
    loss = bilateral_loss(logits, *targets, ratio, F.cross_entropy)
    assert loss.item() == pytest.approx(expected)


def test_labels_without_a_share_are_not_read():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(logits, targets)
    assert bilateral_loss(logits, targets, None, 1.0, F.cross_entropy) == expected
    assert bilateral_loss(logits, None, targets, 0.0, F.cross_entropy) == expected


# Schedules


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        ("parabolic", 0, 1.0),
        ("parabolic", 5, 0.75),
        ("parabolic", 9, 0.19),
        ("reverse-sigmoid", 0, 0.9933071490757153),  # 1 / (1 + e⁻⁵)
        ("reverse-sigmoid", 5, 0.5),
        ("reverse-sigmoid", 9, 0.01798620996209156),  # 1 / (1 + e⁴)
        ("constant", 0, 0.5),
        ("constant", 9, 0.5),
        ("class-head", 0, 0.0),
        ("class-head", 9, 0.0),
    ],
)
def test_mixing_ratio_of_an_epoch_out_of_ten(schedule, epoch, expected):
    assert mixing_ratio(schedule, epoch, 10) == pytest.approx(expected)


def test_steepness_of_the_reverse_sigmoid():
    assert mixing_ratio("reverse-sigmoid", 1, 4, steepness=4) == pytest.approx(0.7310585786300049)
    assert mixing_ratio("reverse-sigmoid", 1, 4, steepness=1e6) == 1
    assert mixing_ratio("reverse-sigmoid", 3, 4, steepness=1e6) == 0
    for progress in GRID:
        symmetric = reverse_sigmoid(progress, 7) + reverse_sigmoid(1 - progress, 7)
        assert symmetric == pytest.approx(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ratio_never_rises_and_is_a_share(schedule):
    ratios = [mixing_ratio(schedule, epoch, 50) for epoch in range(50)]
    assert ratios == sorted(ratios, reverse=True)
    assert all(0 <= ratio <= 1 for ratio in ratios)


def test_unknown_schedule():
    message = r"mixing\.schedule: unknown 'linear'; choose from parabolic, reverse-sigmoid"
    with pytest.raises(InputError, match=message):
        mixing_ratio("linear", 0, 10)


# Heterogeneous learning rate


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.0, 0.0), (0.2, 0.01831563888873418), (0.5, 0.36787944117144233), (1.0, 1.0)],
)
def test_rate_by_hand(ratio, expected):
    """e⁻⁴ at a fifth and e⁻¹ at a half."""
    assert backbone_rate(ratio) == pytest.approx(expected)


def test_the_rate_rises_with_the_ratio_and_stays_below():
    rates = [backbone_rate(ratio) for ratio in GRID]
    assert rates == sorted(rates)
    assert all(0 <= rate < ratio for rate, ratio in zip(rates, GRID, strict=True))


def test_the_rate_vanishes_well_before_the_ratio():
    assert all(backbone_rate(ratio) < 0.001 for ratio in GRID if ratio <= 0.126)
    assert all(backbone_rate(ratio) > 0.001 for ratio in GRID if ratio >= 0.127)
    assert backbone_rate(5e-324) == 0


def test_the_rate_starts_flat_in_time_but_not_in_the_ratio():
    step = 1e-6
    assert (1 - backbone_rate(1 - step)) / step == pytest.approx(1, rel=1e-4)
    start = [backbone_rate(parabolic(progress)) for progress in (0.0, 0.05, 0.1)]
    assert start == pytest.approx([1, 1 - 0.0025 - 0.05**4 / 2, 1 - 0.01 - 0.1**4 / 2], abs=1e-6)

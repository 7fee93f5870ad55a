"""Batch norms side by side, in float64, against PyTorch's batch norm of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssnas.engine.batch_norm import Norm, batch_norm, record_statistics
from ssnas.networks.baselines import BASELINES, build_baseline

CHANNELS = 5
SHAPES = [(4, 6, 7), (9,)]
"""Batch and pixels of an input; the channels come second."""
MODES = ["train", "eval", "frozen"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(shape, count):
    """An input of `count` blocks of channels of many means and scales."""
    n, *pixels = shape
    size = (1, count * CHANNELS, *[1] * len(pixels))
    spread, centre = torch.rand(size).double() + 0.5, 3 * torch.randn(size).double()
    x = centre + spread * torch.randn(n, count * CHANNELS, *pixels).double()
    return x.contiguous(memory_format=torch.channels_last) if pixels else x


def prepared(count, mode, affine):
    """Norms with statistics and parameters of their own, in the given mode."""
    norms = [Norm(CHANNELS, affine=affine, eps=1e-3, momentum=0.2).double() for _ in range(count)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        norm.train(mode != "eval")
        norm.track_running_stats = mode != "frozen"
    return norms


def by_definition(norms, x, scale, mode):
    """PyTorch's batch norm of each block, and the running statistics that it leaves."""
    parts, statistics = [], []
    for i, (norm, block) in enumerate(zip(norms, x.chunk(len(norms), dim=1), strict=True)):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        used = (None, None) if mode == "frozen" else (mean, var)
        part = F.batch_norm(block, *used, norm.weight, norm.bias, mode != "eval", 0.2, 1e-3)
        parts.append(part if scale is None else scale[i] * part)
        statistics.append((mean, var))
    return torch.cat(parts, dim=1), statistics


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "scaled", "affine"])
@pytest.mark.parametrize("count", [1, 3])
def test_norms_side_by_side_are_each_norm(count, kind, mode, shape):
    norms, x = prepared(count, mode, kind == "affine"), drawn(shape, count).requires_grad_()
    scale = torch.randn(count).double().requires_grad_() if kind == "scaled" else None
    of = [x, *([] if scale is None else [scale]), *(p for norm in norms for p in norm.parameters())]
    expected, statistics = by_definition(norms, x, scale, mode)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), of)
    actual = batch_norm(norms, x, scale)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad((actual * direction).sum(), of), wanted)
    for norm, (mean, var) in zip(norms, statistics, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == (mode == "train")


def test_running_statistics_by_hand():
    norm = Norm(1, momentum=0.1).double()
    norm(torch.tensor([[1.0], [3], [8]]).double())
    # Mean 4; deviations −3, −1, 4, whose squares over n − 1 are 26 / 2.
    assert norm.running_mean.item() == pytest.approx(0.1 * 4)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 13)


@pytest.mark.parametrize(("peer", "shape"), [(nn.BatchNorm2d, (4, 3, 3)), (nn.BatchNorm1d, (9,))])
def test_norm_is_pytorchs(peer, shape):
    ours, peer, x = Norm(CHANNELS).double(), peer(CHANNELS).double(), drawn(shape, 1)
    assert ours(x).equal(peer(x))
    assert ours.eval()(x).equal(peer.eval()(x))
    assert ours.state_dict().keys() == peer.state_dict().keys()
    assert all(value.equal(ours.state_dict()[name]) for name, value in peer.state_dict().items())


def test_statistics_are_recorded_for_each_norm():
    norms = [Norm(2) for _ in range(2)]
    record_statistics(norms, torch.arange(4.0), torch.arange(4.0, 8))
    assert [norm.running_mean.tolist() for norm in norms] == [[0, 1], [2, 3]]
    assert [norm.running_var.tolist() for norm in norms] == [[4, 5], [6, 7]]
    assert [norm.num_batches_tracked.item() for norm in norms] == [1, 1]


def test_two_weights_are_refused():
    with pytest.raises(ValueError, match="affine"):
        batch_norm([Norm(CHANNELS)], torch.randn(2, CHANNELS, 3, 3), torch.ones(1))


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_these_norms(name):
    modules = build_baseline(name, 2, 3, 8).modules()
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, Norm) for norm in norms)

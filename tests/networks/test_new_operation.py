"""An operation of one's own, which the engine does not know, in every step of the method."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ssnas.config.schema import Finetune, Search, Views
from ssnas.data.types import Dataset
from ssnas.data.views import Normalise
from ssnas.engine.op_group import describe
from ssnas.finetune import TrainingData, fit
from ssnas.networks.derived import DerivedNetwork, inherit
from ssnas.networks.genotype import derive
from ssnas.networks.operations import OPERATIONS, RELAXATIONS, build, operation
from ssnas.networks.supernet import Supernet
from ssnas.search import search
from ssnas.training.images import TrainingImages

FEW = ("skip_connect", "dil_conv_3x3", "max_pool_3x3")


@pytest.fixture(autouse=True)
def _conv_7x7(monkeypatch):
    monkeypatch.setattr("ssnas.networks.operations.OPERATIONS", dict(OPERATIONS))
    for relaxation in RELAXATIONS:
        monkeypatch.setitem(RELAXATIONS, relaxation, FEW)
    torch.manual_seed(0)

    @operation("conv_7x7")
    def conv_7x7(channels, stride, affine):
        return nn.Conv2d(channels, channels, 7, stride, padding=3, bias=False)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    pixels = (rng.integers(0, 60, (24, 8, 8, 3)) + 90 * labels[:, None, None, None]).astype("uint8")
    return Dataset(pixels, labels.astype(np.int64), ("dark", "grey", "light"))


def supernet_and_definition(**options):
    supernet = Supernet(4, 3, stem_multiplier=1, **options).double()
    for alpha in supernet.architecture_parameters():
        nn.init.normal_(alpha)
    definition = copy.deepcopy(supernet)
    definition.accelerated = False
    return supernet, definition


def assert_equal(actual, expected):
    error = (actual - expected).abs().max().item()
    assert error <= 1e-9 * max(expected.abs().max().item(), 1e-6)


def test_it_is_a_candidate_that_the_engine_does_not_know():
    assert RELAXATIONS["sigmoid"] == (*FEW, "conv_7x7")
    assert describe(build("conv_7x7", 4, 1, affine=False)) is None


@pytest.mark.parametrize(
    "options",
    [{}, {"relaxation": "softmax"}, {"relaxation": "softmax", "partial": 2}, {"checkpoint": True}],
    ids=["sigmoid", "softmax", "partial", "checkpoint"],
)
def test_a_supernet_with_it_equals_its_definition(options):
    supernet, definition = supernet_and_definition(**options)
    x = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    direction = torch.randn(3, supernet.out_features).double()
    for net in (supernet, definition):
        (net(x) * direction).sum().backward()
    assert_equal(supernet(x), definition(x))
    for ours, theirs in zip(supernet.parameters(), definition.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad)
    for ours, theirs in zip(supernet.buffers(), definition.buffers(), strict=True):
        assert_equal(ours.double(), theirs.double())


def test_it_is_searched_derived_inherited_and_trained(images):
    normalise = Normalise.of(images.images)
    config = Search(channels=4, stem_multiplier=1, epochs=2, batch_size=4, projector=8, knn_every=0)
    cpu = torch.device("cpu")
    shown = TrainingImages.of(images, normalise, True, cpu)
    result = search(shown, config, Views(), seed=0)
    assert np.isfinite([row["loss_weights"] for row in result.history]).all()
    weights = {
        kind: w.detach().numpy().copy() for kind, w in result.supernet.architecture().items()
    }
    for table in weights.values():
        table[0] = (0, 0, 0, 1)
    genotype = derive(weights)
    assert (0, 2, "conv_7x7") in genotype.normal
    network = DerivedNetwork(genotype, 4, 3, 3, stem_multiplier=1)
    inherit(network, result.supernet.state_dict())
    name = "cells.0.edges.0.conv_7x7.weight"
    assert torch.equal(network.state_dict()[name], result.supernet.state_dict()[name])
    before = network.state_dict()[name].clone()
    data = TrainingData(images, images, normalise, flip=True)
    fitted = fit(network, data, Finetune(epochs=2, batch_size=8), 0, cpu)
    assert len(fitted.history) == 2
    assert not torch.equal(network.state_dict()[name], before)
    definition = copy.deepcopy(network).double().eval()
    definition.accelerated = False
    x = torch.randn(2, 3, 8, 8).double()
    assert_equal(network.double().eval()(x), definition(x))

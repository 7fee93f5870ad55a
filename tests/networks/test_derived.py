"""The network: published sizes, inheritance from the supernet, multiply-adds."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssnas.config.schema import Finetune, Search
from ssnas.errors import InputError
from ssnas.networks.derived import DerivedNetwork, inherit, multiply_adds, parameter_count
from ssnas.networks.factory import build_network
from ssnas.networks.genotype import Edge, Genotype, derive
from ssnas.networks.operations import RELAXATIONS
from ssnas.networks.space import CELL_KINDS, EDGES
from ssnas.networks.supernet import Supernet

# Liu, Simonyan, Yang 2019, second order.
DARTS_V2 = Genotype(
    normal=(
        Edge(0, 2, "sep_conv_3x3"),
        Edge(1, 2, "sep_conv_3x3"),
        Edge(0, 3, "sep_conv_3x3"),
        Edge(1, 3, "sep_conv_3x3"),
        Edge(1, 4, "sep_conv_3x3"),
        Edge(0, 4, "skip_connect"),
        Edge(0, 5, "skip_connect"),
        Edge(2, 5, "dil_conv_3x3"),
    ),
    reduce=(
        Edge(0, 2, "max_pool_3x3"),
        Edge(1, 2, "max_pool_3x3"),
        Edge(2, 3, "skip_connect"),
        Edge(1, 3, "max_pool_3x3"),
        Edge(0, 4, "max_pool_3x3"),
        Edge(2, 4, "skip_connect"),
        Edge(2, 5, "skip_connect"),
        Edge(1, 5, "max_pool_3x3"),
    ),
)
INPUT_CONVOLUTIONS = tuple(Edge(s, node, "sep_conv_3x3") for node in (2, 3, 4, 5) for s in (0, 1))
SEPARABLE = Genotype(INPUT_CONVOLUTIONS, INPUT_CONVOLUTIONS)
# Every op at both strides, two ops on one edge, and one pool on several edges of a state.
MIXED = Genotype(
    normal=(
        Edge(0, 2, "sep_conv_5x5"),
        Edge(0, 2, "max_pool_3x3"),
        Edge(1, 3, "dil_conv_5x5"),
        Edge(2, 3, "avg_pool_3x3"),
        Edge(2, 4, "avg_pool_3x3"),
        Edge(2, 5, "skip_connect"),
        Edge(4, 5, "dil_conv_3x3"),
    ),
    reduce=(
        Edge(0, 2, "skip_connect"),
        Edge(0, 2, "sep_conv_3x3"),
        Edge(0, 3, "max_pool_3x3"),
        Edge(1, 3, "max_pool_3x3"),
        Edge(1, 4, "max_pool_3x3"),
        Edge(1, 4, "dil_conv_3x3"),
        Edge(0, 5, "avg_pool_3x3"),
        Edge(1, 5, "sep_conv_5x5"),
        Edge(3, 5, "skip_connect"),
        Edge(1, 5, "dil_conv_5x5"),
    ),
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class PlainNetwork(DerivedNetwork):
    """Each cell as it is defined, one operation at a time."""

    accelerated = False


def images(n=4, channels=3, size=9):
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@cache
def trained(relaxation, in_channels):
    supernet = Supernet(4, 3, in_channels, relaxation).double()
    for alpha in supernet.alphas.values():
        nn.init.normal_(alpha)
    with torch.no_grad():
        for _ in range(2):
            supernet(2 * images(channels=in_channels, size=8) + 1)
    return supernet


def searched(relaxation="sigmoid", in_channels=3):
    """A supernet whose α and running statistics a search might have left."""
    return deepcopy(trained(relaxation, in_channels))


def chosen(genotype, ops):
    """Architecture weights that are one at the genotype's operations and zero elsewhere."""
    weights = {kind: torch.zeros(14, len(ops), dtype=torch.float64) for kind in CELL_KINDS}
    for kind in CELL_KINDS:
        for source, target, op in getattr(genotype, kind):
            weights[kind][EDGES.index((source, target)), ops.index(op)] = 1
    return weights


# Published sizes


def test_parameters_of_published_darts():
    # Published as 3.3 M.
    assert parameter_count(DerivedNetwork(DARTS_V2, 36, 20, 10)) == 3_349_342


@pytest.mark.parametrize(("channels", "millions"), [(32, 0.46), (36, 0.58), (40, 0.71), (44, 0.85)])
def test_parameters_of_separable_convolutions(channels, millions):
    network = DerivedNetwork(SEPARABLE, channels, 3, 10)
    assert parameter_count(network) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parameter_count_is_of_trainable_ones():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert parameter_count(layer) == 6


# Forward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("genotype", [MIXED, DARTS_V2], ids=["mixed", "darts"])
def test_forward_is_the_definition(genotype, size, training):
    fast = DerivedNetwork(genotype, 4, 3, 5).double()
    with torch.no_grad():
        fast(images(size=8))
    plain = PlainNetwork(genotype, 4, 3, 5).double()
    plain.load_state_dict(fast.state_dict())
    x = images(size=size)
    for net in (fast, plain):
        net.train(training)(x).square().sum().backward()
    for name, buffer in plain.named_buffers():
        assert_equal(fast.get_buffer(name), buffer)
    gradients = 0
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        # A state that no edge leaves gives its preprocessing no gradient.
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            gradients += 1
            assert_equal(ours.grad, theirs.grad)
    assert gradients > 40
    assert_equal(fast.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(("in_channels", "num_classes"), [(1, 14), (3, 2)])
def test_logits(in_channels, num_classes):
    network = DerivedNetwork(MIXED, 4, 3, num_classes, in_channels)
    assert network(torch.randn(2, in_channels, 8, 11)).shape == (2, num_classes)
    assert network.genotype == MIXED


# Inheritance


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("origin", ["argmax", "mixed"])
def test_inherited_network_is_the_supernet_at_its_choice(origin, relaxation, training):
    supernet = searched(relaxation)
    ops = RELAXATIONS[relaxation]
    if origin == "mixed":
        genotype = MIXED
        architecture = chosen(genotype, ops)
    else:
        table = {kind: alpha.detach().numpy() for kind, alpha in supernet.alphas.items()}
        genotype = derive(table, "argmax")
        # At `none`, too, where that is strongest.
        architecture = {
            kind: torch.from_numpy(np.eye(len(ops))[rows.argmax(1)]) for kind, rows in table.items()
        }
    network = DerivedNetwork(genotype, 4, 3, 5).double()
    inherit(network, supernet.state_dict())
    supernet.train(training)
    network.train(training)
    x = images()
    features = supernet(x, architecture)
    assert_equal(network.features(x), features)
    assert_equal(network.eval()(x), network.classifier(supernet.eval()(x, architecture)))
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert_equal(buffer, supernet.get_buffer(name))


def test_classifier_stays_and_affine_norms_start_as_the_identity():
    network = DerivedNetwork(MIXED, 4, 3, 5).double()
    before = {name: p.clone() for name, p in network.classifier.named_parameters()}
    inherit(network, searched().state_dict())
    for name, parameter in network.classifier.named_parameters():
        assert torch.equal(parameter, before[name])
    affine = [m for m in network.cells.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    assert affine
    for norm in affine:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_inheritance_copies():
    supernet, network = searched(), DerivedNetwork(MIXED, 4, 3, 5).double()
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    inherit(network, supernet.state_dict())
    assert all(p.requires_grad and p.is_leaf for p in network.parameters())
    torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1).zero_grad()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(("searched_on", "used_on"), [(1, 3), (3, 1)])
def test_grey_image_on_all_channels_excites_the_stem_as_before(searched_on, used_on):
    supernet = searched(in_channels=searched_on)
    network = DerivedNetwork(MIXED, 4, 3, 5, in_channels=used_on).double()
    inherit(network, supernet.state_dict())
    grey = images(channels=1)
    given, own = grey.expand(-1, searched_on, -1, -1), grey.expand(-1, used_on, -1, -1)
    assert_equal(network.stem.eval()(own), supernet.stem.eval()(given))
    assert (
        network.stem[0].weight - network.stem[0].weight.mean(1, keepdim=True)
    ).abs().max() < 1e-9


def test_same_channels_keep_the_stem():
    supernet, network = searched(), DerivedNetwork(MIXED, 4, 3, 5).double()
    inherit(network, supernet.state_dict())
    assert torch.equal(network.stem[0].weight, supernet.stem[0].weight)


def test_network_inherits_from_a_network_with_other_classes():
    source, network = (
        DerivedNetwork(MIXED, 4, 3, 14).double(),
        DerivedNetwork(MIXED, 4, 3, 2).double(),
    )
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        source(images())
    classifier = network.classifier.weight.clone()
    inherit(network, source.state_dict())
    x = images()
    assert_equal(network.eval().features(x), source.eval().features(x))
    assert torch.equal(network.classifier.weight, classifier)
    for name, parameter in network.cells.named_parameters():
        assert torch.equal(parameter, source.cells.get_parameter(name))


MISSING = [
    "stem.0.weight",
    "stem.1.running_mean",
    "cells.1.preprocess0.pointwise.weight",
    "cells.0.edges.0.sep_conv_5x5.second.pointwise.weight",
    "cells.2.edges.2.max_pool_3x3.norm.running_var",
]


@pytest.mark.parametrize("name", MISSING)
def test_missing_tensor_is_named(name):
    weights = searched().state_dict()
    del weights[name]
    with pytest.raises(InputError, match=f"inherit: the search's weights have no '{name}'"):
        inherit(DerivedNetwork(MIXED, 4, 3, 5).double(), weights)


def test_missing_operation_is_named():
    weights = DerivedNetwork(DARTS_V2, 4, 3, 5).state_dict()
    with pytest.raises(InputError, match=r"have no 'cells\.0\.edges\.0\.max_pool_3x3\.norm\."):
        inherit(DerivedNetwork(MIXED, 4, 3, 5), weights)


@pytest.mark.parametrize(
    ("channels", "num_cells", "message"),
    [
        (8, 3, r"'stem\.0\.weight' has shape \(12, 3, 3, 3\) .* and \(24, 3, 3, 3\) in the netw"),
        (
            4,
            5,
            r"'cells\.2\.preprocess0\.even\.weight' has shape \(8, 16, 1, 1\) .* \(4, 16, 1, 1\)",
        ),
    ],
)
def test_other_widths_and_depths_are_refused(channels, num_cells, message):
    with pytest.raises(InputError, match=message):
        inherit(DerivedNetwork(MIXED, channels, num_cells, 5).double(), searched().state_dict())


# Multiply-adds


def test_multiply_adds_by_hand():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),  # 6 × 5 pixels, 4 channels, 27 taps
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),  # 2 × 2 pixels, 4 channels, 9 taps
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 7),
    )
    expected = 6 * 5 * 4 * 27 + 2 * 2 * 4 * 9 + 16 * 7
    assert multiply_adds(module, torch.randn(1, 3, 6, 5)) == expected
    assert multiply_adds(module, torch.randn(3, 3, 6, 5)) == expected


@pytest.mark.parametrize("genotype", [MIXED, SEPARABLE], ids=["mixed", "separable"])
@pytest.mark.parametrize("size", [8, 9])
def test_multiply_adds_of_a_network_are_those_of_its_definition(genotype, size):
    x = torch.randn(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PlainNetwork(genotype, 4, 3, 5).eval()(x)
    # PyTorch counts a multiply-add as two operations.
    assert multiply_adds(DerivedNetwork(genotype, 4, 3, 5), x) == counter.get_total_flops() // 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_multiply_adds_leave_no_trace(training):
    network = DerivedNetwork(MIXED, 4, 3, 5).train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    count = multiply_adds(network, x)
    assert multiply_adds(network, x) == count
    assert all(module.training is training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_width_is_the_one_nearest_to_a_number_of_parameters(genotype):
    shape, scratch = (32, 32, 3), Finetune(parameters=20_000, inherit=False)
    network = build_network(scratch, Search(), genotype, 10, shape)
    counts = {
        channels: parameter_count(
            build_network(Finetune(channels=channels), Search(), genotype, 10, shape)
        )
        for channels in range(2, 40)
    }
    nearest = min(counts.values(), key=lambda count: abs(count - 20_000))
    assert parameter_count(network) == nearest
    tiny = build_network(replace(scratch, parameters=1), Search(), genotype, 10, shape)
    assert parameter_count(tiny) == counts[2]


@pytest.mark.parametrize("changes", [{"inherit": True}, {"inherit": False, "channels": 4}])
def test_a_target_of_parameters_stands_alone(genotype, changes):
    config = Finetune(parameters=1000, **changes)
    with pytest.raises(InputError, match=r"finetune\.parameters: found 1000"):
        build_network(config, Search(), genotype, 10, (8, 8, 1))

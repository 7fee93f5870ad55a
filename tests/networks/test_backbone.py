"""Stems against PyTorch's functions and a published size; recomputed cells against kept ones."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

from ssnas.config.load import load_main
from ssnas.config.schema import Search
from ssnas.errors import InputError
from ssnas.networks.backbone import STEMS, shape_of
from ssnas.networks.bilateral import BilateralSupernet, build_supernet
from ssnas.networks.derived import DerivedNetwork, inherit, parameter_count
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import OPERATIONS, RELAXATIONS
from ssnas.networks.supernet import PlainSupernet, Supernet, frozen_statistics
from ssnas.pipeline.artifacts import Places
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.search import run_search
from ssnas.pipeline.transfer import transfer
from ssnas.search import Bilevel

OPS = tuple(OPERATIONS)

FEW = ("avg_pool_3x3", "skip_connect", "dil_conv_3x3")
SIZES = [(32, 32), (33, 41), (47, 30)]


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(RELAXATIONS, "sigmoid", FEW)
    monkeypatch.setitem(RELAXATIONS, "softmax", ("none", *FEW))


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def assert_same_buffers(actual, expected):
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(actual.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


# Stems


def test_the_stem_of_small_images_keeps_its_names_and_their_resolution():
    net = Supernet(4, 3)
    names = [name for name in net.state_dict() if name.startswith("stem.")]
    statistics = [f"stem.1.running_{moment}" for moment in ("mean", "var")]
    expected = ["stem.0.weight", "stem.1.weight", "stem.1.bias", *statistics]
    assert names == [*expected, "stem.1.num_batches_tracked"]
    first, second = net.stem(torch.randn(2, 3, 9, 8))
    assert first is second
    assert first.shape == (2, 12, 9, 8)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_stem_of_large_images_by_hand(in_channels, size):
    stem, x = STEMS["imagenet"](in_channels, 6).double(), normal(4, in_channels, *size)
    convolutions = [m.weight for m in stem.modules() if isinstance(m, nn.Conv2d)]
    assert [len(weight) for weight in convolutions] == [3, 6, 6]
    outputs = [x]
    for index, weight in enumerate(convolutions):
        before = outputs[-1].relu() if index else x
        after = F.conv2d(before, weight, stride=2, padding=1)
        outputs.append(F.batch_norm(after, None, None, training=True))
    s0, s1 = stem(x)
    assert_equal(s0, outputs[2])
    assert_equal(s1, outputs[3])
    eighths = [-(-side // 8) for side in size]
    assert list(s1.shape[2:]) == eighths
    assert list(s0.shape[2:]) == [-(-side // 4) for side in size]


def test_parameters_of_published_darts_for_imagenet():
    # Liu et al. 2019 print 4.7 M for the cells of their second order.
    three, pool = "sep_conv_3x3", "max_pool_3x3"
    normal_cell = [(0, 2, three), (1, 2, three), (0, 3, three), (1, 3, three), (1, 4, three)]
    normal_cell += [(0, 4, "skip_connect"), (0, 5, "skip_connect"), (2, 5, "dil_conv_3x3")]
    reduce_cell = [(0, 2, pool), (1, 2, pool), (1, 3, pool), (0, 4, pool), (1, 5, pool)]
    reduce_cell += [(2, node, "skip_connect") for node in (3, 4, 5)]
    cells = (tuple(Edge(*edge) for edge in cell) for cell in (normal_cell, reduce_cell))
    network = DerivedNetwork(Genotype(*cells), 48, 14, 1000, stem_multiplier=1, stem="imagenet")
    assert parameter_count(network) == 4_718_752


@pytest.mark.parametrize(("in_channels", "size"), [(1, SIZES[0]), (3, SIZES[1])])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_supernet_behind_the_stem_equals_its_plain_twin(in_channels, size, training):
    fast, plain = (
        kind(4, 3, in_channels, stem="imagenet").double() for kind in (Supernet, PlainSupernet)
    )
    x = normal(4, in_channels, *size)
    with torch.no_grad():
        fast(x)
    plain.load_state_dict(fast.state_dict())
    outputs = [net.train(training)(x) for net in (fast, plain)]
    assert_equal(*outputs)
    # Five halvings: three in the stem and one in each reduction cell.
    sides = [-(-side // 32) for side in size]
    assert list(fast.states(x, fast.architecture())[1].shape[2:]) == sides
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad)


def test_the_first_cell_halves_its_first_input():
    assert type(Supernet(4, 3).cells[0].preprocess0).__name__ == "ConvNorm"
    assert type(Supernet(4, 3, stem="imagenet").cells[0].preprocess0).__name__ == "FactorizedReduce"


@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_network_inherits_the_stem(genotype, in_channels):
    """A grey image on all channels excites the inherited stem as it did the searched one."""
    supernet = Supernet(4, 3, stem="imagenet").double()
    x = normal(4, 1, 33, 35)
    with torch.no_grad():
        supernet(x.expand(-1, 3, -1, -1))
    network = DerivedNetwork(genotype, 4, 3, 5, in_channels, stem="imagenet").double()
    inherit(network, supernet.state_dict())
    ours = network.eval().stem(x.expand(-1, in_channels, -1, -1))
    theirs = supernet.eval().stem(x.expand(-1, 3, -1, -1))
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(mine, other)
    with pytest.raises(InputError, match=r"inherit: .*stem\."):
        inherit(DerivedNetwork(genotype, 4, 3, 5).double(), supernet.state_dict())


@pytest.mark.parametrize("build", [Supernet, BilateralSupernet])
def test_unknown_stem(build):
    with pytest.raises(InputError, match=r"search\.stem: unknown 'vgg'; choose from cifar, half"):
        build(4, 3, stem="vgg")


# Recomputed cells

CASES = {
    "sigmoid": {},
    "softmax": {"relaxation": "softmax"},
    "partial": {"relaxation": "softmax", "partial": 2},
    "stem": {"stem": "imagenet", "in_channels": 1},
    "all": {"relaxation": "softmax", "partial": 2, "stem": "imagenet", "num_classes": 3},
    "bilateral": {"sampling": "bilateral", "stem": "imagenet", "num_classes": 3},
}


def pair(case, dtype=torch.float64):
    """Equal supernets with spread-out α, one that keeps its cells and one that recomputes them."""
    options = dict(CASES[case])
    build = BilateralSupernet if options.pop("sampling", None) else Supernet
    kept, recomputed = (build(4, 3, **options, checkpoint=on).to(dtype) for on in (False, True))
    for parameter in kept.architecture_parameters():
        nn.init.normal_(parameter)
    recomputed.load_state_dict(kept.state_dict())
    return kept, recomputed


def images(case, size=11):
    channels = CASES[case].get("in_channels", 3)
    return [normal(4, channels, size, size - 2) for _ in range(2)]


def two_views(net, views):
    """A loss of two forward passes, as that of Barlow Twins."""
    if isinstance(net, BilateralSupernet):
        return net.mixed(*views, 0.3).square().sum()
    first, second = (net(view) for view in views)
    return (first * second).sum() + first.square().sum()


@pytest.mark.parametrize("frozen", [None, "forward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_recomputed_cells_are_the_kept_ones(case, frozen):
    """Outputs, gradients and statistics; α's loss may leave the frozen context before backward."""
    nets, views = pair(case), images(case)
    before = deepcopy(nets[0])
    losses = []
    for net in nets:
        with frozen_statistics(net) if frozen else nullcontext():
            losses.append(two_views(net, views))
            if frozen == "both":
                losses[-1].backward()
        if frozen != "both":
            losses[-1].backward()
    kept, recomputed = nets
    assert_equal(*losses)
    assert_same_buffers(recomputed, before if frozen else kept)
    for name, parameter in kept.named_parameters():
        assert_equal(recomputed.get_parameter(name).grad, parameter.grad)
    recording = [m for m in recomputed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in recording)


@pytest.mark.parametrize(("case", "second_order"), [("sigmoid", False), ("all", True)])
def test_steps_of_the_search_are_the_same(case, second_order):
    nets, validation, training = pair(case), images(case), images(case)
    for net in nets:
        options = {"relaxation": net.relaxation, "alpha_learning_rate": 0.01}
        bilevel = Bilevel(net, nn.Identity(), Search(**options))
        losses = [lambda net=net, x=x: two_views(net, x) for x in (validation, training)]
        for _ in range(2):
            bilevel.step_alpha(losses[0], losses[1] if second_order else None)
            bilevel.step_omega(losses[1])
    kept, recomputed = nets
    for name, parameter in kept.named_parameters():
        assert_equal(recomputed.get_parameter(name), parameter)
    for name, buffer in kept.named_buffers():
        assert_equal(recomputed.get_buffer(name), buffer)


@pytest.mark.parametrize("case", ["sigmoid", "all"])
def test_evaluation_is_the_same(case):
    nets, (x, _) = pair(case), images(case)
    with torch.no_grad():
        assert_equal(*(net(x) for net in nets))
        assert_equal(*(net.eval()(x) for net in nets))
    kept, recomputed = nets
    assert_same_buffers(recomputed, kept)
    for net in nets:
        net(x).square().sum().backward()
    assert_same_buffers(recomputed, kept)
    for name, parameter in kept.named_parameters():
        assert_equal(recomputed.get_parameter(name).grad, parameter.grad)


def test_mixed_precision_is_the_same():
    nets, views = pair("all", torch.float32), [view.float() for view in images("all")]
    for net in nets:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = two_views(net, views)
        loss.backward()
    kept, recomputed = nets
    for name, parameter in kept.named_parameters():
        assert torch.equal(recomputed.get_parameter(name).grad, parameter.grad)


def kept_for_backward(net, x):
    """Bytes, by storage, that a forward pass leaves for the backward pass."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(x)  # alive, so that no storage is used twice
    del output
    return sum(storages.values())


def test_fewer_activations_are_kept():
    nets, (x, _) = pair("softmax"), images("softmax", 32)
    kept, recomputed = (kept_for_backward(net, x) for net in nets)
    assert recomputed < 0.2 * kept


@pytest.mark.parametrize("sampling", ["instance", "bilateral"])
def test_the_search_builds_what_is_asked_for(sampling):
    config = Search(channels=4, sampling=sampling, stem="imagenet", checkpoint=True)
    asked, default = (build_supernet(c, (32, 32, 1), 3) for c in (config, Search(channels=4)))
    assert (asked.stem.reduces, asked.checkpoint) == (True, True)
    assert (default.stem.reduces, default.checkpoint) == (False, False)


@pytest.mark.slow
def test_the_stem_goes_from_the_search_to_the_transfer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RELAXATIONS, "sigmoid", OPS[1:])
    one = {"epochs": 1, "batch_size": 16}
    document = {
        "scales": {"small": {}},
        "dataset": "digits",
        "data": {"size": 20, "largest_class": 40, "profile": "balanced"},
        "search": one | {"channels": 2, "projector": 4, "stem": "imagenet", "checkpoint": True},
        "finetune": one,
        "transfer": {"dataset": "faces", "folds": 2, "epochs": 1, "weights": "finetune"},
    }
    Path("params.yaml").write_text(yaml.safe_dump(document))
    run = load_main()
    for stage in (make_longtail, run_search, derive_genotype, finetune, transfer):
        stage(run)
    searched, tuned = (load_file(getattr(Places.of(run), n)) for n in ("supernet", "network"))
    assert searched["stem.6.weight"].shape == tuned["stem.6.weight"].shape == (6, 6, 3, 3)
    # Without a pre-training it leaves no trace.
    assert {path.name for path in Path(".checkpoints/main").iterdir()} >= {"search", "finetune"}
    assert not Path(".checkpoints/main/pretrain").exists()


def test_the_quarter_stem_is_the_first_two_thirds_of_the_large_one():
    torch.manual_seed(0)
    quarter, eighth = (STEMS[name](3, 6).double() for name in ("quarter", "imagenet"))
    weights = eighth.state_dict()
    quarter.load_state_dict({name: weights[name] for name in quarter.state_dict()})
    x = normal(2, 3, 9, 8)
    s0, s1 = quarter(x)
    assert s0 is s1
    assert_equal(s0, eighth(x)[0])
    assert s0.shape == (2, 6, 3, 2)


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_is_known_by_its_weights(name):
    weights = Supernet(4, 3, stem_multiplier=2, stem=name).state_dict()
    assert shape_of(weights, 2, size=8 if name == "cifar" else 32) == (name, 4)


def test_the_halving_stem_is_the_small_one_on_every_second_pixel():
    torch.manual_seed(0)
    half, full = (STEMS[name](3, 6).double() for name in ("half", "cifar"))
    half.load_state_dict(full.state_dict())
    x = normal(2, 3, 9, 8)
    with torch.no_grad():
        convolved = full[0](x)[:, :, ::2, ::2]
    assert_equal(half(x)[0], half[1](convolved))
    assert half(x)[0].shape == (2, 6, 5, 4)

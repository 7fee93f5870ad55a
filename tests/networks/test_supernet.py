"""Operations and supernet, in float64, against their definitions, PyTorch and hand-made values."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssnas.engine.cpu import library as kernels
from ssnas.errors import InputError
from ssnas.networks.cell import Cell
from ssnas.networks.operations import OPERATIONS, RELAXATIONS, FactorizedReduce, build
from ssnas.networks.space import EDGES, cell_kinds, reduction_positions
from ssnas.networks.supernet import PlainSupernet, Supernet, frozen_statistics
from tests.cells import FORWARDS, by_engine

OPS = tuple(OPERATIONS)

CONVOLUTIONS = OPS[4:]
POOLS = OPS[1:3]
SIZES = [(8, 8), (9, 9), (8, 13), (11, 10)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def assert_equal(actual, expected, tolerance=1e-9):
    """Relative to the largest entry of `expected`."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-6)


def running_statistics(module):
    return {name: b for name, b in module.named_buffers() if name.endswith(("_mean", "_var"))}


# Operations


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_output_is_halved_and_rounded_up(op, stride, size):
    module = build(op, 4, stride, affine=False).double()
    expected = (2, 4, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert module(normal(2, 4, *size)).shape == expected


def test_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'conv'; choose from none, max_pool_3x3"):
        build("conv", 4, 1, affine=False)


def test_skip_is_the_identity_and_none_is_zero():
    x = normal(2, 4, 5, 5)
    assert torch.equal(build("skip_connect", 4, 1, affine=False)(x), x)
    assert not build("none", 4, 2, affine=False)(x).any()


# Depthwise and pointwise kernel, channels C = 6: C k² + C² for each separable convolution.
@pytest.mark.parametrize(
    ("op", "parameters"),
    [
        ("sep_conv_3x3", 2 * (6 * 9 + 36)),
        ("sep_conv_5x5", 2 * (6 * 25 + 36)),
        ("dil_conv_3x3", 6 * 9 + 36),
        ("dil_conv_5x5", 6 * 25 + 36),
        ("max_pool_3x3", 0),
        ("avg_pool_3x3", 0),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_parameters_without_affine_norms(op, parameters, stride):
    module = build(op, 6, stride, affine=False)
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("op", "reach"),
    [("sep_conv_3x3", 2), ("sep_conv_5x5", 4), ("dil_conv_3x3", 2), ("dil_conv_5x5", 4)],
)
def test_receptive_field_is_centred(op, reach):
    module = build(op, 2, 1, affine=False).double().eval()
    for weight in module.parameters():
        nn.init.ones_(weight)  # so that no ReLU cuts anything off
    x = normal(1, 2, 13, 13).abs().requires_grad_()
    module(x)[0, 0, 6, 6].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (6 - reach, 6 + reach)


@pytest.mark.parametrize(("size", "odd"), [(3, [[5, 0], [0, 0]]), (4, [[6, 8], [14, 16]])])
def test_factorized_reduce_by_hand(size, odd):
    module = FactorizedReduce(1, 2, affine=False).double().eval()
    nn.init.ones_(module.even.weight)
    nn.init.ones_(module.odd.weight)
    x = torch.arange(1.0, size**2 + 1).double().reshape(1, 1, size, size)
    expected = torch.stack([x[0, 0, ::2, ::2], torch.tensor(odd).double()])
    # The running variance is 1 to start with.
    assert_equal(module(x)[0], expected / math.sqrt(1 + module.norm.eps))
    assert_equal(module(-x)[0], torch.zeros_like(expected))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", POOLS)
def test_pool_is_normalised(op, stride):
    module, x = build(op, 4, stride, affine=True).double(), normal(3, 4, 7, 7)
    if op == "max_pool_3x3":
        pooled = F.max_pool2d(x, 3, stride, 1)
    else:
        inside = F.avg_pool2d(torch.ones_like(x), 3, stride, 1)
        pooled = F.avg_pool2d(x, 3, stride, 1) / inside
    variance, mean = torch.var_mean(pooled, dim=(0, 2, 3), correction=0, keepdim=True)
    assert_equal(module(x), (pooled - mean) / (variance + 1e-5).sqrt())
    assert not list(module.parameters())


# Cell and topology


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_cell_of_identities_by_hand(forward):
    ops = dict.fromkeys(range(14), ("skip_connect",))
    cell = Cell(ops, (6, 6), 4, False, False, False).double()
    s0, s1 = normal(2, 6, 5, 5), normal(2, 6, 5, 5)
    x0, x1 = cell.preprocess0(s0), cell.preprocess1(s1)
    both = x0 + x1
    doubling = torch.cat([both, 2 * both, 4 * both, 8 * both], dim=1)
    assert_equal(forward(cell, s0, s1), doubling)

    weights = torch.zeros(14, 1, dtype=torch.float64)
    for edge, weight in {(0, 2): 2, (1, 2): 3, (2, 3): 5, (0, 4): 7, (3, 4): 1, (4, 5): -1}.items():
        weights[EDGES.index(edge)] = weight
    x2 = 2 * x0 + 3 * x1
    x3 = 5 * x2
    x4 = 7 * x0 + x3
    assert_equal(forward(cell, s0, s1, weights), torch.cat([x2, x3, x4, -x4], dim=1))


@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_node_that_only_none_enters_is_zero(reduce, partial):
    """And is read as such: an affine batch norm makes its bias of it."""
    ops = {i: ("none",) if node == 3 else ("dil_conv_3x3",) for i, (_, node) in enumerate(EDGES)}
    cell = Cell(ops, (6, 6), 4, reduce, False, True, partial).double()
    for norm in (m for m in cell.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    s0, s1 = normal(2, 6, 5, 5), normal(2, 6, 5, 5)
    y = by_engine(cell, s0, s1)
    assert_equal(y, cell(s0, s1))
    assert partial > 1 or not y[:, 4:8].any()


@pytest.mark.parametrize(
    ("num_cells", "positions"), [(3, (1, 2)), (5, (1, 3)), (8, (2, 5)), (20, (6, 13))]
)
def test_reduction_positions(num_cells, positions):
    assert reduction_positions(num_cells) == positions
    kinds = cell_kinds(num_cells)
    assert len(kinds) == num_cells
    assert tuple(i for i, kind in enumerate(kinds) if kind == "reduce") == positions


@pytest.mark.parametrize("num_cells", [3, 5])
def test_channels_double_and_size_halves_at_reductions(num_cells):
    supernet = Supernet(4, num_cells, in_channels=1, stem_multiplier=2)
    x, weights = torch.randn(2, 1, 13, 13), supernet.architecture()
    shapes = [
        (sum(part.shape[1] for part in parts), *parts[0].shape[2:])
        for parts in supernet.outputs(x, weights)
    ]
    # Nodes of 4, 8 and 16 channels, four to a cell.
    expected = {"3": [(16, 13), (32, 7), (64, 4)]}
    expected["5"] = [(16, 13), (32, 7), (32, 7), (64, 4), (64, 4)]
    assert shapes[:2] == [(8, 13, 13)] * 2
    assert shapes[2:] == [(channels, size, size) for channels, size in expected[str(num_cells)]]
    assert supernet(x).shape == (2, 64) == (2, supernet.out_features)


# Supernet


@cache
def built(relaxation, num_cells):
    fast = Supernet(4, num_cells, relaxation=relaxation).double()
    plain = PlainSupernet(4, num_cells, relaxation=relaxation).double()
    for alpha in fast.alphas.values():
        nn.init.normal_(alpha)
    with torch.no_grad():
        fast(normal(4, 3, 8, 8))
    return fast, plain, {name: tensor.clone() for name, tensor in fast.state_dict().items()}


def twins(relaxation="sigmoid", num_cells=3):
    """A supernet with spread-out α and nontrivial statistics, and its plain twin."""
    fast, plain, state = built(relaxation, num_cells)
    for net in (fast, plain):
        net.load_state_dict(state)
        net.train().zero_grad()
    torch.manual_seed(1)  # the data do not depend on which test built the nets
    return fast, plain


@pytest.fixture(params=["compiled", "composed"])
def _kernels(request, monkeypatch):
    if request.param == "composed":
        monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("num_cells", [3, 5])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_supernet_equals_its_plain_twin(relaxation, num_cells, size, training):
    fast, plain = twins(relaxation, num_cells)
    x, direction = normal(4, 3, size, size), torch.randn(4, fast.out_features).double()
    outputs = []
    for net in (fast, plain):
        net.train(training)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=3e-4)
        output = net(x)
        (output * direction).sum().backward()
        optimizer.step()
        outputs.append(output)
    assert_equal(*outputs)
    live = 0
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad)
        assert_equal(ours, theirs)
        live += theirs.grad.any().item()
    # With recorded statistics a ReLU may cut off an operation of a few channels.
    assert live > 0.95 * len(list(plain.parameters()))
    for name, buffer in running_statistics(plain).items():
        assert_equal(fast.get_buffer(name), buffer)


def test_shared_pools_record_one_statistic():
    fast, plain = twins()
    before = {name: buffer.clone() for name, buffer in running_statistics(fast).items()}
    x = normal(4, 3, 9, 9)
    fast(x)
    plain(x)
    after = running_statistics(fast)
    for index in range(3):
        for op in POOLS:
            for statistic in ("running_mean", "running_var"):
                names = [f"cells.{index}.edges.{e}.{op}.norm.{statistic}" for e in range(14)]
                for name in names:
                    assert not torch.equal(after[name], before[name])
                    assert_equal(after[name], plain.get_buffer(name))
                by_source = sorted(range(14), key=lambda edge: EDGES[edge][0])
                for edge, other in pairwise(by_source):
                    if EDGES[edge][0] == EDGES[other][0]:
                        assert torch.equal(after[names[edge]], after[names[other]])


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_architecture_by_definition(relaxation):
    supernet = Supernet(4, 3, relaxation=relaxation)
    for kind, alpha in supernet.alphas.items():
        nn.init.normal_(alpha)
        weights = supernet.architecture()[kind]
        exponentials = alpha.exp()
        if relaxation == "sigmoid":
            assert weights.shape == (14, 7)
            torch.testing.assert_close(weights, exponentials / (1 + exponentials))
        else:
            assert weights.shape == (14, 8)
            torch.testing.assert_close(weights, exponentials / exponentials.sum(1, keepdim=True))
    assert set(supernet.alphas) == {"normal", "reduce"}


@pytest.mark.parametrize("net_class", [Supernet, PlainSupernet])
def test_given_architecture_takes_the_place_of_alpha(net_class):
    supernet, x = net_class(4, 3).double(), normal(2, 3, 8, 8)
    own = supernet.architecture()
    assert torch.equal(supernet(x, own), supernet(x))
    # Without any operation the nodes are zero.
    assert not supernet(x, {kind: 0 * w for kind, w in own.items()}).any()
    # Each kind of cell has its own weights.
    for kind in own:
        changed = {**own, kind: own[kind].flip(0, 1) ** 2}
        assert (supernet(x, changed) - supernet(x)).abs().max() > 1e-3


def test_unknown_relaxation():
    with pytest.raises(InputError, match=r"search\.relaxation: unknown 'tanh'; .*softmax, sigmoid"):
        Supernet(4, 3, relaxation="tanh")


def test_weights_are_all_parameters_but_alpha():
    supernet = Supernet(4, 3)
    alphas = {id(alpha) for alpha in supernet.alphas.values()}
    weights = {id(weight) for weight in supernet.weights()}
    assert len(weights) == len(supernet.weights())
    assert not weights & alphas
    assert weights | alphas == {id(p) for p in supernet.parameters()}


def test_norms_of_cells_have_no_parameters():
    supernet = Supernet(4, 3)
    norms = [m for m in supernet.cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.affine for norm in norms)


def test_frozen_weights_leave_the_gradients_of_alpha():
    supernet, _ = twins()
    x = normal(4, 3, 9, 9)
    direction = torch.randn(4, supernet.out_features).double()
    gradients = []
    for requires_grad in (True, False, True):
        for weight in supernet.weights():
            weight.requires_grad_(requires_grad)
        supernet.zero_grad(set_to_none=True)
        (supernet(x) * direction).sum().backward()
        gradients.append([alpha.grad for alpha in supernet.alphas.values()])
        assert all((weight.grad is not None) is requires_grad for weight in supernet.weights())
    for first, *others in zip(*gradients, strict=True):
        for other in others:
            assert_equal(other, first)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("net_class", [Supernet, PlainSupernet])
def test_mixed_precision(net_class, training):
    supernet, x = net_class(4, 3).train(training), torch.randn(8, 3, 9, 9)
    expected = supernet(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = supernet(x)
    actual.float().square().sum().backward()
    # bfloat16 keeps 8 bits, and a few dozen layers lose some of them.
    assert F.cosine_similarity(actual.float(), expected).min() > 0.98
    assert all(p.grad.isfinite().all() and p.grad.any() for p in supernet.alphas.values())
    assert all(p.dtype == torch.float32 for p in supernet.parameters())


# Frozen statistics


@pytest.mark.parametrize("index", [0, 1], ids=["fast", "plain"])
def test_frozen_statistics_record_nothing(index):
    supernet, x = twins()[index], normal(4, 3, 9, 9)
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    with frozen_statistics(supernet):
        output = supernet(x)
        output.sum().backward()
    for name, buffer in supernet.named_buffers():
        assert torch.equal(buffer, before[name]), name
    # Batch statistics are used, and recording goes on afterwards.
    assert_equal(supernet(x), output)
    for name, buffer in running_statistics(supernet).items():
        assert not torch.equal(buffer, before[name]), name


def test_frozen_statistics_end_with_an_exception():
    tracking, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(KeyError), frozen_statistics(nn.Sequential(tracking, other)):
        assert not tracking.track_running_stats
        raise KeyError
    assert tracking.track_running_stats
    assert not other.track_running_stats

"""Partial channel connections against PC-DARTS' equations, PyTorch and hand-made values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssnas.errors import InputError
from ssnas.networks.backbone import Backbone
from ssnas.networks.cell import Cell
from ssnas.networks.genotype import derive
from ssnas.networks.operations import OPERATIONS, RELAXATIONS, build, bypass, channel_shuffle
from ssnas.networks.space import CELL_KINDS, EDGES
from ssnas.networks.supernet import ALPHA_STD, PlainSupernet, Supernet, architecture_of, relax
from tests.cells import FORWARDS as FORWARD_WAYS

OPS = tuple(OPERATIONS)

FEW = ("none", "avg_pool_3x3", "skip_connect", "dil_conv_3x3")
MIXED = dict.fromkeys(range(14), FEW)
IDENTITIES = dict.fromkeys(range(14), ("none", "skip_connect"))
FORWARDS = pytest.mark.parametrize("forward", FORWARD_WAYS.values(), ids=FORWARD_WAYS)


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(RELAXATIONS, "softmax", FEW)


def normal(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def partial_supernet(channels=4, partial=2, net_class=Supernet, **options):
    net = net_class(channels, 3, relaxation="softmax", partial=partial, **options).double()
    for parameter in net.architecture_parameters():
        nn.init.normal_(parameter)
    return net


def bare_cell(ops, reduce):
    """A cell of four channels, K = 2, whose states 0 and 1 are its inputs."""
    cell = Cell(ops, (4, 4), 4, reduce, False, False, partial=2).double()
    cell.preprocess0 = cell.preprocess1 = nn.Identity()
    return cell


def edge_weights(rows):
    """(14, ops), zero on all other edges."""
    zero = (0,) * len(next(iter(rows.values())))
    return torch.tensor([rows.get(edge, zero) for edge in EDGES]).double()


# Bypass and shuffle


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_channel_shuffle_is_pytorchs(groups):
    x = normal(2, 6, 3, 5)
    assert torch.equal(channel_shuffle(x, groups), nn.ChannelShuffle(groups)(x))
    assert channel_shuffle(x, groups).is_contiguous(memory_format=torch.channels_last)


def test_channel_shuffle_by_hand():
    shuffled = channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 3)
    assert shuffled.flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_bypass_by_hand():
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert bypass(x, 1) is x
    assert bypass(x, 2)[0, 0].tolist() == [[5, 6], [8, 9]]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)])
def test_bypass_has_the_size_of_the_operations(size):
    x = normal(1, 2, *size)
    assert bypass(x, 2).shape == build("none", 2, 2, affine=False)(x).shape


# Cell


@FORWARDS
def test_edge_by_hand(forward):
    cell, s0 = bare_cell(IDENTITIES, reduce=False), torch.tensor([1.0, 2, 3, 4]).double()
    # Two channels times 2, two times β = 1 + 2: 2, 4, 9, 12 before the shuffle.
    weights = edge_weights({(0, 2): (1, 2), (2, 3): (0.5, 0.5)})
    out = forward(cell, s0.view(1, 4, 1, 1), torch.zeros(1, 4, 1, 1).double(), weights)
    node2, node3, *others = out.flatten().view(4, 4).tolist()
    assert node2 == [2, 9, 4, 12]
    assert node3 == [1, 4, 4.5, 12]
    assert others == [[0] * 4] * 2


@FORWARDS
def test_strided_edge_by_hand(forward):
    cell = bare_cell(dict.fromkeys(range(14), ("none",)), reduce=True)
    s1 = torch.arange(1.0, 10).double() * torch.tensor([[1], [10], [100], [1000]])
    weights = edge_weights({(1, 2): (2,)})
    out = forward(cell, torch.zeros(1, 4, 3, 3).double(), s1.view(1, 4, 3, 3), weights)
    pooled = torch.tensor([[5, 6], [8, 9]]).double()
    assert torch.equal(
        out[0, :4], torch.stack([0 * pooled, 200 * pooled, 0 * pooled, 2000 * pooled])
    )
    assert not out[0, 4:].any()


@FORWARDS
def test_without_weights_everything_counts_once(forward):
    cell, s0, s1 = bare_cell(IDENTITIES, reduce=False), normal(1, 4, 3, 3), normal(1, 4, 3, 3)
    assert_equal(forward(cell, s0, s1)[:, :4], nn.ChannelShuffle(2)(s0 + s1))


@FORWARDS
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_cell_is_that_of_pc_darts(forward, reduce, size):
    """The published equation, with β in front of each whole edge."""
    cell, alpha, beta = Cell(MIXED, (5, 6), 6, reduce, False, False, 2).double(), *edge_parameters()
    s0, s1 = normal(3, 5, *size), normal(3, 6, *size)
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    for node in range(2, 6):
        entering = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        state = 0
        for strength, edge in zip(beta[entering].softmax(0), entering, strict=True):
            source = states[EDGES[edge][0]]
            ops = cell.edges[str(edge)].values()
            mixed = sum(
                w * op(source[:, :3]) for w, op in zip(alpha[edge].softmax(0), ops, strict=True)
            )
            other = source[:, 3:]
            if mixed.shape[2:] != other.shape[2:]:
                other = F.max_pool2d(other, 2, ceil_mode=True)
            state = state + strength * nn.ChannelShuffle(2)(torch.cat([mixed, other], dim=1))
        states.append(state)
    assert_equal(forward(cell, s0, s1, relax(alpha, "softmax", beta)), torch.cat(states[2:], dim=1))


def edge_parameters():
    return normal(14, len(FEW)), normal(14)


@pytest.mark.parametrize("reduce", [False, True])
def test_operations_have_the_parameters_of_fewer_channels(reduce):
    cell = Cell(MIXED, (4, 4), 8, reduce, False, False, partial=4)
    for edge, (source, _) in enumerate(EDGES):
        for op, module in cell.edges[str(edge)].items():
            alone = build(op, 2, 2 if reduce and source < 2 else 1, affine=False)
            shapes = [p.shape for p in module.parameters()]
            assert shapes == [p.shape for p in alone.parameters()]


@pytest.mark.parametrize("partial", [0, -1, 4, 12])
def test_partial_must_divide_the_channels(partial):
    message = rf"search\.partial: found {partial}, .* 6 channels; choose from 1, 2, 3, 6$"
    with pytest.raises(InputError, match=message):
        Supernet(6, 3, relaxation="softmax", partial=partial)


# Supernet


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("partial", "size"), [(2, (8, 8)), (2, (9, 7)), (4, (9, 9))])
def test_supernet_equals_its_plain_twin(partial, size, training):
    fast, plain = (partial_supernet(4, partial, kind) for kind in (Supernet, PlainSupernet))
    x = normal(4, 3, *size)
    with torch.no_grad():
        fast(x)
    plain.load_state_dict(fast.state_dict())
    direction = normal(4, fast.out_features)
    outputs = []
    for net in (fast, plain):
        outputs.append(net.train(training)(x))
        (outputs[-1] * direction).sum().backward()
    assert_equal(*outputs)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad)
        if name.startswith(("alphas.", "betas.")):
            assert theirs.grad.any()
    for name, buffer in plain.named_buffers():
        if name.endswith(("_mean", "_var")):
            assert_equal(fast.get_buffer(name), buffer)


def test_partial_1_draws_and_computes_as_before():
    torch.manual_seed(3)
    ordinary = Supernet(4, 3, relaxation="softmax", num_classes=2, partial=1)
    torch.manual_seed(3)
    edges = dict.fromkeys(CELL_KINDS, MIXED)
    stack = Backbone(edges, 4, 3, affine=False)
    alphas = {kind: ALPHA_STD * torch.randn(14, len(FEW)) for kind in CELL_KINDS}
    classifier = nn.Linear(stack.out_features, 2)
    expected = stack.state_dict()
    expected |= {f"alphas.{kind}": alpha for kind, alpha in alphas.items()}
    expected |= {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    state = ordinary.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    x = torch.randn(2, 3, 8, 8)
    weights = {kind: alpha.softmax(1) for kind, alpha in alphas.items()}
    assert torch.equal(ordinary(x), classifier(stack.features(x, weights)))


def test_architecture_parameters_and_weights_are_all_parameters_once():
    net = Supernet(4, 3, relaxation="softmax", partial=2)
    expected = {f"{table}.{kind}" for table in ("alphas", "betas") for kind in CELL_KINDS}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    searched = [names[id(parameter)] for parameter in net.architecture_parameters()]
    weights = [names[id(parameter)] for parameter in net.weights()]
    assert set(searched) == expected
    assert sorted(searched + weights) == sorted(names.values())
    assert set(net.alphas) == {"normal", "reduce"}
    for beta in net.betas.values():
        assert beta.shape == (14,)
        assert 0 < beta.abs().max() < 10 * ALPHA_STD


def test_without_partial_channels_alpha_are_the_architecture_parameters():
    net = Supernet(4, 3, relaxation="softmax")
    assert list(map(id, net.architecture_parameters())) == list(map(id, net.alphas.values()))


def test_edges_are_normalised_by_hand():
    net = Supernet(4, 3, relaxation="softmax", partial=2)
    with torch.no_grad():
        for parameter in net.alphas.values():
            parameter.zero_()
        net.betas["normal"].copy_(torch.tensor([source + 1.0 for source, _ in EDGES]).log())
    # Into node j lead j edges: 1 + 2 = 3, 1 + 2 + 3 = 6, 10, 15.
    totals = {2: 3, 3: 6, 4: 10, 5: 15}
    expected = torch.tensor([(source + 1) / totals[target] for source, target in EDGES])
    row = net.architecture()["normal"]
    torch.testing.assert_close(row, expected[:, None].expand(14, 4) / 4)


def test_edges_into_a_node_sum_to_one():
    net = partial_supernet()
    for weights in net.architecture().values():
        for node in range(2, 6):
            entering = [target == node for _, target in EDGES]
            assert_equal(weights[entering].sum(), torch.tensor(1.0).double())


def test_architecture_of_a_saved_supernet():
    net = partial_supernet()
    saved = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    own = architecture_of(saved, "softmax")
    assert own.keys() == net.architecture().keys()
    assert all(torch.equal(own[kind], weights) for kind, weights in net.architecture().items())

    alpha, beta = edge_parameters()
    others = architecture_of({"alphas.a": alpha, "alphas.b": alpha, "betas.b": beta}, "softmax")
    assert torch.equal(others["a"], alpha.softmax(1))
    assert torch.equal(others["b"], relax(alpha, "softmax", beta))
    assert torch.equal(architecture_of({"alphas.a": alpha}, "sigmoid")["a"], alpha.sigmoid())


def test_derivation_compares_edges_by_beta():
    alpha, beta = torch.zeros(14, len(FEW)), torch.zeros(14)
    alpha[:, FEW.index("skip_connect")] = 1
    chosen = {(0, 2), (1, 2), (1, 3), (2, 3), (0, 4), (3, 4), (2, 5), (4, 5)}
    for edge in chosen:
        beta[EDGES.index(edge)] = 0.1
    genotype = derive(dict.fromkeys(CELL_KINDS, relax(alpha, "softmax", beta)), "darts")
    assert set(genotype.normal) == {(*edge, "skip_connect") for edge in chosen}


def test_partial_channels_need_the_softmax():
    with pytest.raises(InputError, match=r"search\.partial: found 2 .*relaxation softmax$"):
        Supernet(4, 3, relaxation="sigmoid", partial=2)


def test_mixed_precision():
    net, x = partial_supernet().float(), torch.randn(8, 3, 9, 9)
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = net(x)
    actual.float().square().sum().backward()
    assert F.cosine_similarity(actual.float(), expected).min() > 0.98
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.architecture_parameters())


def kept_bytes(net, x):
    """Bytes that the backward pass keeps, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(x)  # alive, so that no storage is used twice
    del output
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_fewer_activations_are_kept(monkeypatch):
    monkeypatch.setitem(RELAXATIONS, "softmax", OPS)
    x = torch.randn(4, 3, 8, 8)
    kept = [
        kept_bytes(Supernet(8, 3, relaxation="softmax", partial=partial), x)
        for partial in (1, 2, 4)
    ]
    assert kept[2] < 0.6 * kept[0]
    assert kept[2] < kept[1] < kept[0]

"""Mixed operations, compiled and composed, against the operations one by one."""

import copy
import weakref

import pytest
import torch
from torch import nn

from ssnas.engine.batch_norm import Norm, joined
from ssnas.engine.cpu import autograd, passes
from ssnas.engine.cpu import library as kernels
from ssnas.engine.cpu.tape import Tape
from ssnas.engine.graph import Graph
from ssnas.engine.op_group import OpGroup
from ssnas.engine.torch_backend import Readings
from ssnas.networks.operations import OPERATIONS, ConvNorm, FactorizedReduce, Zero, build

OPS = tuple(OPERATIONS)

compiled = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
SIZES = [(8, 8), (9, 7), (1, 2), (5, 12)]
MODES = ["train", "eval", "frozen"]
REAL = [op for op in OPS if op != "none"]


@pytest.fixture(params=[pytest.param("compiled", marks=compiled), "composed"])
def path(request, monkeypatch):
    if request.param == "composed":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


@pytest.fixture
def fresh():
    """`library` as in a new process."""
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Spoiling(Tape):
    """Whose memory is overwritten as soon as it is given back."""

    def free(self, *regions):
        for region in regions:
            if region.tensor == self._memory.tensor:
                self.call("clear", region, region.count)
        super().free(*regions)


@pytest.fixture(autouse=True)
def _spoiled(monkeypatch):
    """New memory holds no numbers, so that what is read before it was written shows."""
    empty = autograd.empty
    monkeypatch.setattr(autograd, "empty", lambda *args: empty(*args).fill_(torch.nan))
    monkeypatch.setattr(passes, "Tape", Spoiling)


def images(channels, size, n=3, dtype=torch.float64):
    x = 2 * torch.randn(n, channels, *size, dtype=dtype) - 0.5
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def operations(name, count, channels, stride=1, affine=False, mode="train", dtype=torch.float64):
    """Operations with weights and statistics of their own, but poolings alike, as in a cell."""
    ops = [build(name, channels, stride, affine).to(dtype) for _ in range(count)]
    return [prepared(op, mode, recorded="pool" not in name) for op in ops]


def prepared(op, mode, recorded=True):
    for norm in (m for m in op.modules() if isinstance(m, Norm)):
        if recorded:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        norm.track_running_stats = mode != "frozen"
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    return op.train(mode != "eval")


def add_mixed(sums, x, terms, scales=None):
    """Add the operations on state 0 to the sums; `scales`: for each term the w_o of its edges."""
    return Graph(terms, 1, len(sums))([x], joined(scales) if scales else None, sums)


def leaving(ops, sums=None):
    """A term from state 0 to the sums, which follow it, or to one for each operation."""
    sums = range(len(ops)) if sums is None else sums
    return OpGroup(ops, tuple(1 + index for index in sums), (0,))


def one_by_one(sums, x, terms, scales=None):
    """What `add_mixed` is defined as."""
    found = list(sums)
    for index, term in enumerate(terms):
        for position, (op, target) in enumerate(zip(term.ops, term.targets, strict=True)):
            edge = target - 1
            value = op(x) if scales is None else scales[index][position] * op(x)
            found[edge] = value if found[edge] is None else found[edge] + value
    return found


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    largest = expected.abs().max().clamp(min=1e-6)
    assert (actual - expected).abs().max() <= tolerance * largest


def assert_as_defined(sums, x, terms, scales=None, tolerance=1e-9, wanted=None):
    """Results, gradients of all (or the wanted) inputs, and running statistics."""
    twins = copy.deepcopy(terms)
    results, gradients = [], []
    for function, own in ((one_by_one, twins), (add_mixed, terms)):
        given = [None if total is None else total.clone() for total in sums]
        new = function(given, x, own, scales)
        weights = [w for term in own for op in term.ops for w in op.parameters()]
        inputs = [x, *(total for total in sums if total is not None), *(scales or []), *weights]
        inputs = [t for t in inputs if t.requires_grad] if wanted is None else wanted
        torch.manual_seed(1)
        loss = sum((t * torch.randn(t.shape).to(t)).sum() for t in new if t is not None)
        results.append([t for t in new if t is not None])
        gradients.append(torch.autograd.grad(loss, inputs))
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, tolerance)
    # A batch norm takes away what would change its mean: such gradients are rounding errors.
    largest = max(gradient.abs().max() for gradient in gradients[0])
    for expected, actual in zip(*gradients, strict=True):
        assert actual.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-3 * largest)
        assert (actual - expected).abs().max() <= tolerance * scale
    for term, twin in zip(terms, twins, strict=True):
        for op, peer in zip(term.ops, twin.ops, strict=True):
            for (name, own), other in zip(op.named_buffers(), peer.buffers(), strict=True):
                torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, msg=name)


# Sizes that fill whole vectors of eight doubles, more than one, and parts of one.
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "count"), [(3, 1), (8, 3), (20, 2)])
@pytest.mark.parametrize("name", REAL)
def test_each_operation(path, name, channels, count, stride, size):
    terms = [leaving(operations(name, count, channels, stride))]
    scales = [torch.randn(count).double().requires_grad_()]
    assert_as_defined([None] * count, images(channels, size), terms, scales)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_operations_together(path, stride, affine, mode):
    """Each on other edges, added to sums that some nodes have already."""
    edges = [(0, 1, 2), (1,), (0, 2), (2, 1), (0,), (1, 2), (0, 1)]
    terms = [
        leaving(operations(name, len(own), 5, stride, affine, mode), own)
        for name, own in zip(REAL, edges, strict=True)
    ]
    halved = [5, 4] if stride == 2 else [9, 7]
    sums = [images(5, halved), None, images(5, halved), None]
    scales = None if affine else [torch.randn(len(own)).double().requires_grad_() for own in edges]
    x = images(5, (9, 7))
    assert_as_defined(sums, x, terms, scales)
    assert add_mixed([None] * 4, x, terms, scales)[3] is None


def graph_terms(stride):
    """Given 0 and 1; of the sums 2 to 6, nothing enters 5 and nothing leaves 3 and 6."""

    def term(name, stride, *targets, source, weighted=True):
        return OpGroup(operations(name, len(targets), 4, stride), targets, (source,), weighted)

    return [
        OpGroup([prepared(ConvNorm(6, 4, False).double(), "train")], (2,), (0,), weighted=False),
        term("avg_pool_3x3", stride, 3, 4, source=1),
        term("dil_conv_3x3", stride, 3, 6, source=2),
        term("skip_connect", stride, 4, source=2, weighted=False),
        term("sep_conv_3x3", 1, 6, source=4),
        term("max_pool_3x3", 1, 6, source=5),
        term("skip_connect", 1, 6, source=5),
    ]


def sums_by_definition(terms, given, before, scale):
    states = [*given, *before]
    for term in sorted(terms, key=lambda term: max(term.sources)):
        start = sum(len(t.targets) for t in terms[: terms.index(term)] if t.weighted)
        x = torch.cat([states[source] for source in term.sources], dim=1)
        for position, (op, target) in enumerate(zip(term.ops, term.targets, strict=True)):
            value = op(x)
            if term.weighted and scale is not None:
                value = scale[start + position] * value
            states[target] = value if states[target] is None else states[target] + value
    return states[len(given) :]


@pytest.mark.parametrize("outputs", [(0, 1, 2, 3, 4), (4,), (1, 2), (0,)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sums_that_further_operations_read(path, stride, outputs):
    """Whatever of them is used, and whatever needs a gradient."""
    terms = graph_terms(stride)
    twins = copy.deepcopy(terms)
    given = [images(6, (7, 6)), images(4, (7, 6))]
    scale = torch.randn(7).double().requires_grad_()
    before = [None, None, None, images(4, (4, 3) if stride == 2 else (7, 6)), None]
    for wanted in (given, [scale], [before[3]], [given[0], before[3], scale]):
        for tensor in (*given, before[3], scale):
            tensor.requires_grad_(any(tensor is own for own in wanted))
        results = []
        for compute, own in ((Graph(terms, 2, 5), terms), (None, twins)):
            copies = [None if t is None else t.clone() for t in before]
            if compute:
                sums = compute(given, scale, copies)
            else:
                sums = sums_by_definition(own, given, copies, scale)
            torch.manual_seed(1)
            loss = sum((sums[i] * torch.randn(sums[i].shape)).sum() for i in outputs)
            weights = [w for term in own for op in term.ops for w in op.parameters()]
            found = torch.autograd.grad(loss, [*wanted, *weights], allow_unused=True)
            results.append([*sums, *(f if f is not None else torch.zeros(1) for f in found)])
        for actual, expected in zip(*results, strict=True):
            if expected.abs().max() > 1e-12:
                assert_same(actual, expected)
            else:
                assert actual.abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("outputs", [(5, 6, 7), (7,), (3, 4)])
def test_operations_that_read_several_states(path, outputs, affine, mode):
    """As between cells: the channels of several states, which others read as well."""

    def term(op, target, *sources):
        return OpGroup([prepared(op.double(), mode)], (target,), sources, weighted=False)

    terms = [
        term(Norm(6, affine=affine), 1, 0),
        term(ConvNorm(6, 4, affine), 2, 1),
        term(build("max_pool_3x3", 4, 1, affine), 3, 2),
        term(nn.Identity(), 3, 2),
        term(Zero(1), 4, 2),
        OpGroup(
            [prepared(ConvNorm(12, 5, affine).double(), mode) for _ in range(2)], (5, 6), (2, 3, 4)
        ),
        term(FactorizedReduce(8, 3, affine), 7, 3, 2),
        term(build("sep_conv_3x3", 4, 1, affine), 4, 3),
    ]
    twins = copy.deepcopy(terms)
    x = images(6, (7, 5))
    results = []
    for compute, own in ((Graph(terms, 1, 7), terms), (None, twins)):
        sums = compute([x]) if compute else sums_by_definition(own, [x], [None] * 7, None)
        torch.manual_seed(1)
        loss = sum((sums[i - 1] * torch.randn(sums[i - 1].shape)).sum() for i in outputs)
        weights = [w for term in own for op in term.ops for w in op.parameters()]
        found = torch.autograd.grad(loss, [x, *weights], allow_unused=True)
        buffers = [b.double() for term in own for op in term.ops for b in op.buffers()]
        gradients = [torch.zeros(1) if gradient is None else gradient for gradient in found]
        results.append([*sums, *buffers, *gradients])
    for actual, expected in zip(*results, strict=True):
        if expected.abs().max() > 1e-9:
            assert_same(actual, expected)
        else:
            assert actual.abs().max() < 1e-9


def test_a_graph_follows_its_operations(path):
    """What it plans once must not outlive a change of mode, of weights, or a copy."""
    terms = graph_terms(1)
    graph = Graph(terms, 2, 5)
    given, scale = [images(6, (5, 4)), images(4, (5, 4))], torch.randn(7).double()
    before = [None, None, None, images(4, (5, 4)), None]

    def check(graph):
        expected = sums_by_definition(copy.deepcopy(graph.groups), given, before, scale)
        for actual, own in zip(graph(given, scale, before), expected, strict=True):
            assert_same(actual, own)

    check(graph)
    for op in (op for term in terms for op in term.ops):
        op.eval()
    check(graph)
    twin = copy.deepcopy(graph)
    for parameter in (w for term in terms for op in term.ops for w in op.parameters()):
        parameter.data = torch.randn_like(parameter)
    check(graph)
    check(twin)


def test_a_graph_follows_the_sizes_of_its_images(path, monkeypatch):
    """Those that it has met before, and others, when it keeps only few programs."""
    monkeypatch.setattr(autograd, "KEPT_PASSES", 2)
    terms = [leaving(operations("sep_conv_3x3", 2, 3)), leaving(operations("skip_connect", 2, 3))]
    graph = Graph(terms, 1, 2)
    for size in [*SIZES, *SIZES]:
        x = images(3, size)
        with torch.no_grad():
            alone = graph([x])
        expected = one_by_one([None, None], x, copy.deepcopy(terms))
        actual = graph([x])
        for own, peer in zip(alone, actual, strict=True):
            assert torch.equal(own, peer)
        for own, peer in zip(actual, expected, strict=True):
            assert_same(own, peer)
        direction = torch.randn(actual[0].shape)
        gradients = [torch.autograd.grad((y[0] * direction).sum(), x) for y in (actual, expected)]
        assert_same(gradients[0][0], gradients[1][0])


def test_a_mode_counts_when_it_is_computed(path):
    """The gradients belong to what was computed, whatever changed since."""
    terms = [leaving(operations("sep_conv_3x3", 1, 3))]
    x = images(3, (6, 5))
    (expected,) = one_by_one([None], x, copy.deepcopy(terms))
    (actual,) = add_mixed([None], x, terms)
    terms[0].ops[0].eval()
    direction = torch.randn(actual.shape)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (actual, expected)]
    assert_same(*gradients)


def test_several_results_await_their_gradients(path):
    """As two views of a batch do: a further result must not replace what the first one needs."""
    graph = Graph([leaving(operations("sep_conv_3x3", 1, 3, mode="frozen"))], 1, 1)
    given = [images(3, (6, 5)) for _ in range(3)]
    (together,) = torch.autograd.grad(
        sum(graph([x])[0].square().sum() for x in given), given[1], retain_graph=True
    )
    (alone,) = torch.autograd.grad(graph([given[1]])[0].square().sum(), given[1])
    assert torch.equal(together, alone)


def test_gradients_may_be_asked_for_twice(path):
    x = images(3, (6, 5))
    (y,) = add_mixed([None], x, [leaving(operations("dil_conv_5x5", 1, 3))])
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


def test_saved_tensors_may_come_back_in_another_layout(path):
    """As from hooks that keep them elsewhere."""
    terms = [
        OpGroup(operations("sep_conv_3x3", 1, 3, mode="eval"), (i + 1,), (i,)) for i in range(2)
    ]
    x, found = images(3, (6, 5)), []
    for pack in (lambda tensor: tensor, lambda tensor: tensor.contiguous()):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, y = Graph(terms, 1, 2)([x])
        found += torch.autograd.grad(y.square().sum(), x)
    assert_same(*found)


@compiled
def test_a_result_that_was_changed_is_refused():
    """Its gradient would be that of another."""
    terms = [OpGroup(operations("sep_conv_3x3", 1, 3), (i + 1,), (i,)) for i in range(2)]
    first, second = Graph(terms, 1, 2)([images(3, (6, 5))])
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_sums_without_a_part_in_the_loss(path):
    """Two terms enter a sum that nothing reads; one of them has another target, which counts."""
    terms = [
        OpGroup(operations("dil_conv_3x3", 2, 3, affine=True), (1, 2), (0,)),
        OpGroup(operations("dil_conv_5x5", 1, 3, affine=True), (2,), (0,)),
    ]
    reached, _ = Graph(terms, 1, 2)([images(3, (6, 5))])
    reached.square().sum().backward()
    for op in (terms[0].ops[1], terms[1].ops[0]):
        for weight in op.parameters():
            assert weight.grad is None or not weight.grad.any()
    assert all(weight.grad.any() for weight in terms[0].ops[0].parameters())


def test_what_is_added_to_may_change(path):
    """Only the sum is read again."""
    before, x = images(3, (6, 5)), images(3, (6, 5))
    total = before * 1
    (y,) = add_mixed([total], x, [leaving(operations("dil_conv_3x3", 1, 3))])
    with torch.no_grad():
        total.add_(1)
    (gradient,) = torch.autograd.grad(y.square().sum(), before)
    assert_same(gradient, 2 * y.detach())


@compiled
@pytest.mark.parametrize("counter", [None, torch.tensor(0.0), torch.tensor(0, dtype=torch.int32)])
def test_counters_of_another_type_are_refused(counter):
    ops = operations("dil_conv_3x3", 1, 2)
    ops[0].norm.num_batches_tracked = counter
    with pytest.raises(TypeError, match="running statistics"):
        add_mixed([None], images(2, (3, 4)), [leaving(ops)])


@compiled
def test_programs_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(autograd, "KEPT_PASSES", 2)
    made = []
    monkeypatch.setattr(passes, "Tape", lambda *args, **kwargs: made.append(1) or Tape(*args))
    graph = Graph([leaving(operations("skip_connect", 1, 2))], 1, 1)
    for size, programs in (((2, 2), 1), ((3, 3), 2), ((2, 2), 2), ((4, 4), 3), ((2, 2), 3)):
        graph([images(2, size).detach()])
        assert len(made) == programs


@compiled
def test_a_norm_without_momentum_is_refused():
    """The cumulative average, which the kernels do not know."""
    ops = operations("dil_conv_3x3", 1, 2)
    ops[0].norm.momentum = None
    with pytest.raises(TypeError, match="NoneType"):
        add_mixed([None], images(2, (3, 4)), [leaving(ops)])


@pytest.mark.parametrize("reached", [0, 1])
@pytest.mark.parametrize("name", REAL)
def test_gradients_of_some_results_alone(path, name, reached):
    """Operations side by side, of which some have no part in the loss."""
    ops = operations(name, 2, 3, stride=2, affine=True)
    x = images(3, (6, 5))
    results = []
    for function, own in ((one_by_one, copy.deepcopy(ops)), (add_mixed, ops)):
        sums = function([None, None], x, [leaving(own)])
        inputs = [x, *(weight for op in own for weight in op.parameters())]
        loss = (sums[reached] * torch.arange(sums[reached].numel()).view(sums[reached].shape)).sum()
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        results.append(
            [
                torch.zeros_like(tensor) if gradient is None else gradient
                for gradient, tensor in zip(found, inputs, strict=True)
            ]
        )
    largest = max(gradient.abs().max() for gradient in results[0])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * largest


@compiled
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_5x5", "dil_conv_3x3", "max_pool_3x3"])
def test_bands_of_a_large_image_meet(name, stride):
    """A band has half a megabyte: these images have several."""
    terms = [leaving(operations(name, 2, 8, stride))]
    assert_as_defined([None, None], images(8, (151, 67), n=2), terms)


@compiled
@pytest.mark.parametrize("name", REAL)
def test_single_precision(name):
    terms = [leaving(operations(name, 3, 16, dtype=torch.float32))]
    x = images(16, (16, 16), dtype=torch.float32)
    assert_as_defined([None] * 3, x, terms, tolerance=2e-5)


@compiled
def test_only_the_gradients_that_are_needed():
    ops = operations("sep_conv_3x3", 2, 4, mode="frozen")
    x, scale = images(4, (6, 5)), torch.randn(2).double().requires_grad_()
    terms = [leaving(ops), leaving(operations("avg_pool_3x3", 2, 4, mode="frozen"))]
    scales = [scale, torch.ones(2).double()]
    everything = [x, *(weight for op in ops for weight in op.parameters()), scale]
    for wanted in ([x], [scale], [ops[1].first.depthwise.weight], [ops[0].second.pointwise.weight]):
        for tensor in everything:
            tensor.requires_grad_(any(tensor is own for own in wanted))
        expected = one_by_one([None, None], x, terms, scales)
        actual = add_mixed([None, None], x, terms, scales)
        direction = torch.randn(expected[0].shape).double()
        loss, peer = ((own[0] * direction + own[1] ** 2).sum() for own in (actual, expected))
        assert_same(torch.autograd.grad(loss, wanted)[0], torch.autograd.grad(peer, wanted)[0])


@compiled
def test_contiguous_images_are_accepted():
    x = images(4, (6, 5)).detach().contiguous().requires_grad_()
    sums = [torch.randn(3, 4, 6, 5).double().requires_grad_()]
    assert_as_defined(sums, x, [leaving(operations("sep_conv_3x3", 1, 4))])


def test_gradients_of_gradients(path):
    """The compiled ones have none, and say so."""
    x = images(2, (3, 4))
    (y,) = add_mixed([None], x, [leaving(operations("dil_conv_3x3", 1, 2))])
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    if path == "composed":
        assert torch.autograd.grad(gradient.square().sum(), x)[0].any()
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_a_scale_of_affine_norms_is_refused(path):
    terms = [leaving(operations("sep_conv_3x3", 1, 2, affine=True))]
    with pytest.raises(ValueError, match="affine"):
        add_mixed([None], images(2, (3, 4)), terms, [torch.ones(1).double()])


def test_a_weight_for_each_edge(path):
    terms = [leaving(operations("skip_connect", 2, 2))]
    with pytest.raises((ValueError, RuntimeError), match=r"split|weights"):
        Graph(terms, 1, 2)([images(2, (3, 4))], torch.ones(1).double())


def test_tensors_of_several_types_are_refused(path):
    terms = [leaving(operations("sep_conv_3x3", 1, 2))]
    with pytest.raises((TypeError, RuntimeError), match="type"):
        add_mixed([None], images(2, (3, 4), dtype=torch.float32), terms)


@compiled
@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_another_type_are_refused(mode):
    ops = operations("sep_conv_3x3", 2, 2, mode=mode)
    norm = ops[1].first.norm
    norm.running_var = norm.running_var.float()
    with pytest.raises(TypeError, match="running statistics"):
        add_mixed([None, None], images(2, (3, 4)), [leaving(ops)])


def test_a_term_leads_to_a_later_state():
    with pytest.raises(ValueError, match="must lead on"):
        Graph([OpGroup([nn.Identity()], (1,), (1,))], 1, 2)


def test_what_the_loss_does_not_reach_has_no_gradient(path):
    """Not zeros, with which an optimiser would decay the weights."""
    terms = [
        OpGroup(operations("sep_conv_3x3", 1, 4, affine=True), (i + 1,), (i,)) for i in range(2)
    ]
    first, _ = Graph(terms, 1, 2)([images(4, (6, 5))])
    first.sum().backward()
    reached, beyond = ([w.grad for op in term.ops for w in op.parameters()] for term in terms)
    assert all(gradient is not None for gradient in reached)
    assert all(gradient is None for gradient in beyond)


def test_without_terms_nothing_is_added(path):
    total = torch.randn(2, 3, 4, 4)
    assert add_mixed([total, None], images(3, (4, 4)), []) == [total, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [ConvNorm, FactorizedReduce])
@pytest.mark.parametrize(("read", "channels"), [(3, 8), (8, 3), (20, 17), (64, 16), (40, 40)])
def test_projections_to_other_channels(path, read, channels, kind, affine, mode):
    """One of an image, as before most cells, and two, as before the first."""
    for count in (1, 2):
        ops = [prepared(kind(read, channels, affine).double(), mode) for _ in range(count)]
        x = images(read, (7, 9))
        assert_as_defined([None] * count, x, [leaving(ops)])


@compiled
@pytest.mark.parametrize("kind", [ConvNorm, FactorizedReduce])
def test_projections_find_only_what_is_needed(kind):
    ops = [prepared(kind(6, 4, False).double(), "frozen")]
    x = images(6, (3, 3))
    first = next(ops[0].parameters())
    for wanted, frozen in ((x, first), (first, x)):
        wanted.requires_grad_(True)
        frozen.requires_grad_(False)
        results = [f([None], x, [leaving(ops)])[0] for f in (add_mixed, one_by_one)]
        direction = torch.randn(results[0].shape)
        assert_same(*(torch.autograd.grad((y * direction).sum(), wanted)[0] for y in results))


def test_the_first_of_equal_values_is_the_largest(path):
    """As PyTorch has it, whose gradients of images with flat areas must be ours."""
    x = torch.ones(1, 1, 4, 4).double().requires_grad_()
    pool = operations("max_pool_3x3", 1, 1, mode="eval")
    (y,) = add_mixed([None], x, [leaving(pool)])
    expected = torch.tensor([[4.0, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient[0, 0], expected / (1 + 1e-5) ** 0.5, check_dtype=False)


def test_a_single_value_has_no_variance(path):
    terms = [leaving(operations("dil_conv_3x3", 1, 3))]
    with pytest.raises(ValueError, match=r"more than (one|1) value"):
        add_mixed([None], images(3, (1, 1), n=1), terms)


@compiled
@pytest.mark.parametrize("name", ["max_pool_3x3", "dil_conv_3x3"])
def test_moments_far_from_zero_keep_their_digits(name):
    """The naive Σx² − (Σx)²/n has none left here."""
    (op,) = operations(name, 1, 5, dtype=torch.float32)
    op.norm.momentum = 1.0
    if name == "dil_conv_3x3":
        nn.init.dirac_(op.depthwise.weight, groups=5)
        nn.init.dirac_(op.pointwise.weight)
    x = torch.randn(8, 5, 40, 40) + 1000
    add_mixed([None], x, [leaving([op])])
    value = (op.pool(x) if name == "max_pool_3x3" else x).double()
    var, mean = torch.var_mean(value, dim=(0, 2, 3))
    torch.testing.assert_close(op.norm.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(op.norm.running_var.double(), var, rtol=1e-4, atol=0)


@compiled
@pytest.mark.parametrize("name", REAL)
def test_a_broken_number_is_not_hidden(name):
    """A search stops at a loss that is not finite, so every operation must let NaN pass."""
    x = images(4, (8, 8)).detach()
    x[0, 0, 4, 4] = torch.nan
    terms = [leaving(operations(name, 1, 4, mode="eval"))]
    (actual,), (expected,) = (f([None], x, terms) for f in (add_mixed, one_by_one))
    assert expected[0].isnan().any()
    assert torch.equal(actual.isnan(), expected.isnan())


@compiled
def test_the_number_of_threads_changes_nothing():
    before, results = torch.get_num_threads(), []
    x = images(8, (16, 16), n=5)
    terms = [leaving(operations(name, 2, 8, mode="frozen")) for name in REAL]
    inputs = [x, *(weight for term in terms for op in term.ops for weight in op.parameters())]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = add_mixed([None, None], x, terms)
            loss = sum(own.square().sum() for own in y)
            results.append((*y, *torch.autograd.grad(loss, inputs)))
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-10, atol=1e-10)


def test_one_relu_serves_all_readers():
    source = Readings(torch.randn(1, 2, 3, 3))
    assert source.rectified() is source.rectified()
    assert source.rectified(3) is source.rectified(3)
    assert torch.equal(source.rectified(3), torch.cat([source.x.relu()] * 3, dim=1))
    blocks = Readings(torch.randn(1, 4, 3, 3), blocks=2)
    assert torch.equal(blocks.rectified(2), blocks.x.relu())


@compiled
def test_only_what_is_needed_is_kept(monkeypatch):
    x = images(8, (32, 32), n=8)
    terms = [OpGroup(operations("sep_conv_3x3", 1, 8), (i + 1,), (i,)) for i in range(6)]

    def peak(gradients, backward):
        """Most bytes that results held at one time, over those of x."""
        held, most = 0, 0

        def empty(shape, dtype):
            nonlocal held, most
            tensor = torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
            count = tensor.untyped_storage().nbytes()
            held += count
            most = max(most, held)

            def gone():
                nonlocal held
                held -= count

            weakref.finalize(tensor.untyped_storage(), gone)
            return tensor

        monkeypatch.setattr(autograd, "empty", empty)
        with torch.set_grad_enabled(gradients):
            *_, y = Graph(terms, 1, 6)([x])
        if backward:
            torch.autograd.grad(y.sum(), x)
        return most // x.nbytes

    # Two layers and their sum for each of six.
    assert peak(gradients=True, backward=False) == 18
    # All six sums, and the layers of one or two.
    assert peak(gradients=False, backward=False) <= 10
    # The gradients for x, for two states and for a layer, and what is given.
    assert peak(gradients=True, backward=True) <= 18 + 5


@compiled
def test_mixed_precision_is_composed(monkeypatch):
    monkeypatch.setattr(autograd, "compute", None)
    ops = operations("dil_conv_3x3", 1, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = add_mixed([None], images(4, (4, 4), dtype=torch.float32), [leaving(ops)])
    assert y.dtype == torch.bfloat16

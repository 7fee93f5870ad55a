"""Networks as `nn.Module`s that others look into, copy, trace, export and compile."""

import copy

import pytest
import torch
from torch import nn

from ssnas.engine import graph
from ssnas.engine.cpu import autograd
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import kept_operations
from ssnas.networks.space import EDGES
from ssnas.networks.supernet import Supernet

CELL = tuple(Edge(*edge, kept_operations()[i % 7]) for i, edge in enumerate(EDGES))


@pytest.fixture
def network():
    """A derived network with every operation, in its default state but for its statistics."""
    torch.manual_seed(0)
    network = DerivedNetwork(Genotype(CELL, CELL), 4, 3, 5)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def computed_by_engine(monkeypatch):
    """Counts the graphs that the engine computes."""
    calls = []
    run = graph.Graph.__call__
    monkeypatch.setattr(
        graph.Graph, "__call__", lambda self, *args: calls.append(1) or run(self, *args)
    )
    return calls


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_forward_hooks_of_cells_and_operations_fire(network, x, training, computed_by_engine):
    network.train(training)
    expected = copy.deepcopy(network)(x)
    assert computed_by_engine
    seen = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    assert_close(network(x), expected)
    # Containers are never called.
    containers = nn.ModuleDict | nn.ModuleList
    modules = network.named_modules()
    assert set(seen) == {name for name, module in modules if not isinstance(module, containers)}
    assert torch.equal(seen[""], network.classifier(seen["cells.2"].mean(dim=(2, 3))))


def test_a_hook_may_change_what_an_operation_gives(network, x):
    name = next(iter(network.cells[2].edges["13"]))
    before = network(x)
    handle = network.cells[2].edges["13"][name].register_forward_hook(lambda m, i, y: 0 * y)
    assert (network(x) - before).abs().max() > 1e-3
    handle.remove()
    assert_close(network(x), before)


def test_global_hooks_see_the_cells(network, x):
    kinds = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: kinds.add(type(m)))
    network(x)
    handle.remove()
    assert {"Cell", "SepConv", "Pool"} <= {kind.__name__ for kind in kinds}


def test_gradient_hooks_of_a_cell_fire(network, x):
    seen = []
    network.cells[1].register_full_backward_hook(lambda m, i, gradients: seen.append(gradients))
    network(x.requires_grad_()).sum().backward()
    assert seen[0][0].shape == (2, 32, 5, 4)


def test_an_exchanged_operation_counts(network, x):
    network(x)
    edge = network.cells[0].edges["4"]
    (name,) = edge
    edge[name] = nn.Conv2d(4, 4, 7, padding=3)
    plain = copy.deepcopy(network)
    plain.accelerated = False
    assert_close(network(x), plain(x))


def test_a_forward_of_ones_own_counts(network, x):
    """Set on the module, or in a class below ours."""
    op = next(op for op in network.cells[0].edges["4"].values())
    before = network(x)
    op.forward = lambda x: torch.zeros_like(x)
    assert (network(x) - before).abs().max() > 1e-3
    del op.forward
    kind = type(op)
    op.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    fresh = copy.deepcopy(network)
    plain = copy.deepcopy(network)
    plain.accelerated = False
    assert_close(fresh(x), plain(x))


def test_batch_norms_in_several_modes(network, x):
    network.train()
    network.cells[1].preprocess0.norm.eval()
    plain = copy.deepcopy(network)
    plain.accelerated = False
    assert_close(network(x), plain(x))
    for ours, theirs in zip(network.buffers(), plain.buffers(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("used", [True, False])
def test_a_deep_copy_is_a_network_of_its_own(network, x, used):
    if used:
        network(x)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x), network(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert (twin(x) - network(x)).abs().max() > 1e-3


def test_gradients_for_the_images(network):
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    network.double()
    direction = torch.randn(3, 6, 5).double()
    (network(x)[0, 0]).backward()
    h = 1e-6
    with torch.no_grad():
        difference = (network(x + h * direction) - network(x - h * direction))[0, 0] / (2 * h)
    assert difference.item() == pytest.approx((x.grad[0] * direction).sum().item(), rel=1e-4)


def test_functional_call_and_vmap(network, x):
    weights = dict(network.named_parameters()) | dict(network.named_buffers())
    assert_close(torch.func.functional_call(network, weights, (x,)), network(x))

    def total(weights, image):
        return torch.func.functional_call(network, weights, (image[None],)).sum()

    detached = {name: weight.detach() for name, weight in network.named_parameters()}
    per_image = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(detached, x)
    summed = torch.autograd.grad(network(x).sum(), network.classifier.weight)[0]
    assert_close(per_image["classifier.weight"].sum(0), summed)


def test_trace(network, x):
    traced = torch.jit.trace(network, x)
    other = torch.randn(2, 3, 9, 8)
    assert_close(traced(other), network(other))


def test_export(network, x):
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    other = torch.randn(5, 3, 9, 8)
    assert_close(program.module()(other), network(other))


@pytest.mark.slow
def test_onnx(network, x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compile_traces_the_whole_network_once(network, x, training):
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    network.train(training)
    twin = torch.compile(copy.deepcopy(network), backend=backend, fullgraph=True)
    for _ in range(4):
        assert_close(twin(x), network(x))
    for batch in range(3, 9):
        twin(torch.randn(batch, 3, 9, 8))
    # Once for the first size of a batch, and once for all others.
    assert len(compiled) <= 2
    torch.compiler.reset()


@pytest.mark.slow
def test_compile_leaves_the_supernet_its_gradients(x):
    torch.manual_seed(0)
    supernet = Supernet(2, 3, stem_multiplier=1)
    twin = copy.deepcopy(supernet)
    gradients = []
    for net in (supernet, torch.compile(twin, backend="eager")):
        net(x).square().sum().backward()
    for ours, theirs in zip(supernet.parameters(), twin.parameters(), strict=True):
        gradients.append((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
    assert max(gradients) < 1e-2
    torch.compiler.reset()


def test_without_a_look_the_engine_computes(network, x, computed_by_engine, monkeypatch):
    """Otherwise nothing above would show anything."""
    network(x)
    assert len(computed_by_engine) == 1
    if graph.library.library() is not None:
        monkeypatch.setattr(autograd, "compute", None)
        with pytest.raises(TypeError):
            network(x)


def test_an_exchanged_cell_counts(network, x):
    before = network(x)
    other = copy.deepcopy(network.cells[0])
    with torch.no_grad():
        other.preprocess0.pointwise.weight.mul_(-1)
    network.cells[0] = other
    plain = copy.deepcopy(network)
    plain.accelerated = False
    assert_close(network(x), plain(x))
    assert (network(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["max_pool_3x3", "avg_pool_3x3"])
def test_poolings_of_one_state_keep_statistics_of_their_own(kind, x):
    """The engine computes one for all where their statistics agree, and only there."""
    torch.manual_seed(0)
    cell = tuple(Edge(*edge, kind) for edge in EDGES)
    network = DerivedNetwork(Genotype(cell, cell), 4, 3, 5).eval()
    alike = network(x)
    assert_close(alike, plainly(network, x))
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
    different = network(x)
    assert_close(different, plainly(network, x))
    assert (different - alike).abs().max() > 0.01


def plainly(network, x):
    """What the modules' own `forward` gives: a hook makes the engine step aside."""
    handles = [module.register_forward_hook(lambda *_: None) for module in network.modules()]
    result = network(x)
    for handle in handles:
        handle.remove()
    return result

"""Separable convolutions, compiled and composed, against PyTorch's convolutions one by one."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from ssnas import kernels, norms
from ssnas.norms import Norm
from ssnas.separable import Source, _Separable, separable

compiled = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
SIZES = [(8, 8), (9, 7), (1, 2), (5, 12)]


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.fixture
def fresh():
    """`library` as in a new process."""
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


def problem(channels=3, count=2, blocks=1, kernel=3, size=(8, 8), dtype=torch.float64, n=2):
    torch.manual_seed(0)
    x = torch.randn(n, channels * blocks, *size, dtype=dtype)
    depthwise = [torch.randn(channels, 1, kernel, kernel, dtype=dtype) for _ in range(count)]
    pointwise = [torch.randn(channels, channels, 1, 1, dtype=dtype) for _ in range(count)]
    tensors = [x.contiguous(memory_format=torch.channels_last), *depthwise, *pointwise]
    return [tensor.requires_grad_() for tensor in tensors]


def ours(tensors, blocks, stride, dilation):
    x, kernels = tensors[0], tensors[1:]
    half = len(kernels) // 2
    return separable(Source(x, blocks), kernels[:half], kernels[half:], stride, dilation)


def one_by_one(tensors, blocks, stride, dilation):
    x, kernels = tensors[0].relu(), tensors[1:]
    half = len(kernels) // 2
    inputs = x.chunk(blocks, dim=1) if blocks > 1 else [x] * half
    results = []
    for own, depthwise, pointwise in zip(inputs, kernels[:half], kernels[half:], strict=True):
        padding = dilation * (depthwise.shape[-1] // 2)
        y = conv2d(own, depthwise, None, stride, padding, dilation, len(depthwise))
        results.append(conv2d(y, pointwise))
    return torch.cat(results, dim=1)


def assert_same(tensors, blocks, stride, dilation, tolerance=1e-12, wanted=None):
    """Results, and the gradients of the tensors in `wanted` (all of them by default)."""
    found = []
    inputs = tensors if wanted is None else [tensors[index] for index in wanted]
    for function in (ours, one_by_one):
        y = function(tensors, blocks, stride, dilation)
        torch.manual_seed(1)
        found.append((y, *torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y))))
    for actual, expected in zip(*found, strict=True):
        assert actual.shape == expected.shape
        largest = expected.abs().max().clamp(min=1e-6)
        assert (actual - expected).abs().max() <= tolerance * largest


# Sizes that fill whole vectors of eight doubles, more than one, and parts of one.
@compiled
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("channels", "count", "blocks"), [(3, 1, 1), (8, 3, 1), (20, 3, 3)])
def test_equals_its_definition(channels, count, blocks, kernel, stride, dilation, size):
    tensors = problem(channels, count, blocks, kernel, size)
    assert_same(tensors, blocks, stride, dilation)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (3, 1), (3, 3)])
def test_equals_its_definition_without_a_compiler(
    without_compiler, count, blocks, stride, dilation
):
    assert_same(problem(4, count, blocks, 5, (9, 7)), blocks, stride, dilation)


@compiled
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_bands_of_a_large_image_meet(stride, blocks):
    """A band has half a megabyte: these images have several."""
    assert_same(problem(8, 2, blocks, 5, (151, 67), n=1), blocks, stride, 1)


@compiled
def test_single_precision():
    tensors = problem(16, 4, 1, 5, (16, 16), torch.float32)
    assert_same(tensors, 1, 1, 2, tolerance=1e-5)


@compiled
@pytest.mark.parametrize("wanted", [[0], [1, 2], [3, 4], [0, 1, 2, 3, 4]])
def test_only_the_gradients_that_are_needed(wanted):
    tensors = problem()
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in wanted)
    assert_same(tensors, 1, 1, 1, wanted=wanted)


@compiled
def test_contiguous_images_are_accepted():
    tensors = problem()
    tensors[0] = tensors[0].detach().contiguous().requires_grad_()
    assert_same(tensors, 1, 2, 1)


@compiled
def test_gradients_of_gradients():
    tensors = problem(2, 2, 1, 3, (3, 4), n=1)
    assert torch.autograd.gradgradcheck(lambda *t: ours(t, 1, 1, 2), tensors)


@compiled
@pytest.mark.parametrize("blocks", [1, 2])
def test_gradients_of_gradients_of_contiguous_images(blocks):
    """The kernels read a channels-last copy, through which autograd must find the images."""
    x, *kernels_ = problem(2, 2, blocks, 3, (3, 4))
    x = x.detach().contiguous().requires_grad_()
    before = None if blocks == 1 else [Norm(2, affine=False).double() for _ in range(2)]

    def convolved(x, *kernels_):
        return separable(Source(x, blocks, before), kernels_[:2], kernels_[2:], 1, 1)

    assert torch.autograd.gradgradcheck(convolved, [x, *kernels_])


@compiled
def test_gradients_of_gradients_behind_a_batch_norm():
    x, *kernels_ = problem(2, 2, 2, 3, (3, 4))
    affine = [Norm(2).double() for _ in range(2)]

    def normalised(x, *kernels_):
        return separable(Source(x, 2, affine), kernels_[:2], kernels_[2:], 1, 1)

    assert torch.autograd.gradgradcheck(normalised, [x, *kernels_])


def pair(affine, channels=4, blocks=3):
    """Norms with statistics and weights of their own, and PyTorch's with the same."""
    torch.manual_seed(2)
    ours_, peers = [], []
    for _ in range(blocks):
        norm, peer = Norm(channels, affine=affine).double(), nn.BatchNorm2d(channels, affine=affine)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        peer.double().load_state_dict(norm.state_dict())
        ours_.append(norm)
        peers.append(peer)
    return ours_, peers


def assert_same_statistics(ours_, peers):
    for norm, peer in zip(ours_, peers, strict=True):
        for name, buffer in peer.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


@compiled
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_before_is_applied_in_passing(affine, mode):
    ours_, peers = pair(affine)
    for norm in (*ours_, *peers):
        norm.train(mode != "eval")
        norm.track_running_stats = mode != "frozen"
    x, *kernels_ = problem(4, 3, 3, 5, (7, 6))
    with torch.no_grad():
        x.mul_(3).add_(1)
    actual = separable(Source(x, 3, ours_), kernels_[:3], kernels_[3:], 1, 1)
    normalised = [peer(part) for peer, part in zip(peers, x.chunk(3, dim=1), strict=True)]
    expected = one_by_one([torch.cat(normalised, dim=1), *kernels_], 3, 1, 1)
    direction = torch.randn(expected.shape).double()
    gradients = []
    for y, own in ((actual, ours_), (expected, peers)):
        weights = [weight for norm in own for weight in norm.parameters()]
        gradients.append(torch.autograd.grad((y * direction).sum(), [x, *kernels_, *weights]))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for given, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    assert_same_statistics(ours_, peers)


@pytest.mark.parametrize("path", [pytest.param("compiled", marks=compiled), "composed"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_normalised_sum_is_the_sum_of_the_norms(monkeypatch, path, scaled, blocks):
    if path == "composed":
        monkeypatch.setattr(kernels, "library", lambda: None)
    sets = [pair(affine=not scaled, blocks=blocks) for _ in range(2)]
    torch.manual_seed(3)
    xs = [(2 * torch.randn(3, 4 * blocks, 5, 4).double() - 1).requires_grad_() for _ in sets]
    scales = [torch.randn(blocks).double().requires_grad_() if scaled else None for _ in sets]
    terms = [
        norms.Term(x, ours_, scale) for (ours_, _), x, scale in zip(sets, xs, scales, strict=True)
    ]
    actual = norms.normalised_sum(terms, 4 * blocks)
    expected = 0
    for (_, peers), x, scale in zip(sets, xs, scales, strict=True):
        parts = [peer(part) for peer, part in zip(peers, x.chunk(blocks, dim=1), strict=True)]
        if scaled:
            parts = [weight * part for weight, part in zip(scale, parts, strict=True)]
        expected = expected + torch.cat(parts, dim=1)
    direction = torch.randn(expected.shape).double()
    gradients = []
    for y, side in ((actual, 0), (expected, 1)):
        inputs = [*xs, *(scale for scale in scales if scaled)]
        inputs += [w for both in sets for norm in both[side] for w in norm.parameters()]
        gradients.append(torch.autograd.grad((y * direction).sum(), inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    for given, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-10)
    for ours_, peers in sets:
        assert_same_statistics(ours_, peers)


@pytest.mark.parametrize("path", [pytest.param("compiled", marks=compiled), "composed"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_terms_that_all_edges_share(monkeypatch, path, mode, scaled, blocks):
    """A pooling with its batch norm, and an identity, beside a term for each edge."""
    if path == "composed":
        monkeypatch.setattr(kernels, "library", lambda: None)
    ours_, peers = pair(False, blocks=blocks)
    for norm in (*ours_, *peers):
        norm.train(mode != "eval")
        norm.track_running_stats = mode != "frozen"
    torch.manual_seed(3)
    pooled, state = (torch.randn(3, 4, 5, 4).double().requires_grad_() for _ in range(2))
    own = torch.randn(3, 4 * blocks, 5, 4).double().requires_grad_()
    scales = [torch.randn(blocks).double().requires_grad_() if scaled else None for _ in range(2)]
    terms = [
        norms.Term(own),
        norms.Term(pooled, ours_, scales[0]),
        norms.Term(state, None, scales[1]),
    ]
    actual = norms.normalised_sum(terms, 4 * blocks)
    weights = scales if scaled else [torch.ones(blocks).double()] * 2
    parts = [weights[0][e] * peers[e](pooled) + weights[1][e] * state for e in range(blocks)]
    expected = own + torch.cat(parts, dim=1)
    direction = torch.randn(expected.shape).double()
    inputs = [own, pooled, state, *(scale for scale in scales if scaled)]
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    for given, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-10)
    assert_same_statistics(ours_, peers)


@compiled
def test_gradients_of_gradients_of_a_normalised_sum():
    torch.manual_seed(0)
    own, shared = torch.randn(2, 4, 3, 2).double(), torch.randn(2, 2, 3, 2).double()
    scale, affine = torch.randn(2).double(), [Norm(2).double() for _ in range(2)]
    pools = [Norm(2, affine=False).double() for _ in range(2)]

    def summed(own, shared, scale):
        terms = [norms.Term(own, affine), norms.Term(shared, pools, scale)]
        return norms.normalised_sum([*terms, norms.Term(shared, None, scale)], 4)

    inputs = [tensor.requires_grad_() for tensor in (own, shared, scale)]
    assert torch.autograd.gradgradcheck(summed, inputs)


@compiled
def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match=r"more than one value a channel; found \(1, 3, 1, 1\)"):
        norms.moments(torch.randn(1, 3, 1, 1))


@compiled
def test_moments_far_from_zero_keep_their_digits():
    """The naive Σx² − (Σx)²/n has none left here."""
    torch.manual_seed(0)
    x = (torch.randn(8, 5, 40, 40) + 1000).contiguous(memory_format=torch.channels_last)
    mean, var = norms.moments(x)
    wanted_var, wanted_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-4, atol=0)


@compiled
def test_a_broken_number_is_not_hidden():
    """A search stops at a loss that is not finite, so a rectifier must let NaN pass."""
    tensors = problem()
    with torch.no_grad():
        tensors[0][0, 0, 4, 4] = torch.nan
    y = ours(tensors, 1, 1, 1)
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


@compiled
def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tensors = problem(8, 3, 1, 5, (16, 16), n=5)
            y = ours(tensors, 1, 1, 1)
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-12, atol=1e-12)


def test_one_relu_serves_all_readers(without_compiler):
    source = Source(torch.randn(1, 2, 3, 3))
    assert source.rectified() is source.rectified()
    assert source.rectified(3) is source.rectified(3)
    assert torch.equal(source.rectified(3), torch.cat([source.state.relu()] * 3, dim=1))
    blocks = Source(torch.randn(1, 4, 3, 3), blocks=2)
    assert torch.equal(blocks.rectified(2), blocks.state.relu())


@compiled
def test_mixed_precision_is_composed(monkeypatch):
    monkeypatch.setattr(_Separable, "apply", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(problem(dtype=torch.float32), 1, 1, 1).dtype == torch.bfloat16


# Building


@compiled
def test_built_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.library() is kernels.library()
    (built,) = (tmp_path / "ssnas").iterdir()
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels, "_build", None)
    assert kernels.library()._name == str(built)


@compiled
def test_a_changed_source_is_built_anew(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.library()._name
    changed = tmp_path / "kernels.cpp"
    changed.write_text(kernels.SOURCE.read_text() + "// another\n")
    monkeypatch.setattr(kernels, "SOURCE", changed)
    kernels.library.cache_clear()
    assert kernels.library()._name != first


def test_a_compiler_that_fails_is_said_once(fresh, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no such flag' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
        assert kernels.library() is None
    (record,) = caplog.records
    assert "no such flag" in record.getMessage()


@pytest.mark.parametrize(
    ("variables", "says"), [({"SSNAS_NATIVE": "0"}, False), ({"CXX": "no-such-compiler"}, True)]
)
def test_without_kernels(fresh, monkeypatch, caplog, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
    assert ("g++" in caplog.text) is says
    assert_same(problem(), 1, 1, 1)


@compiled
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_one_openmp_runtime():
    """A second one's threads would fight with PyTorch's for the cores."""
    script = (
        "from ssnas import kernels; assert kernels.library()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert len(ast.literal_eval(done.stdout)) == 1

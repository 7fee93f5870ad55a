"""The baseline networks: published sizes, and outputs against plain formulas."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

from ssnas.errors import InputError
from ssnas.networks.baselines import (
    BASELINES,
    NormalisedLinear,
    build_baseline,
    normalise_classifier,
)
from ssnas.networks.bilateral import BilateralSupernet
from ssnas.networks.derived import multiply_adds, parameter_count


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layers(network, kind):
    return [layer for layer in network.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize(
    ("name", "num_classes", "in_channels", "size", "parameters"),
    [
        ("plain-cnn", 10, 3, 32, 145_242),
        # 341,792 without a classifier of 1000 classes, from the 1,366,792 of torchvision's page.
        ("shufflenet", 10, 3, 32, 1_366_792 - 1000 * 1025 + 10 * 1025),
        ("resnet-32", 10, 3, 32, 464_154),
        # The first kernels see 2 channels less; 4 classes more have 64 weights and a bias each.
        ("resnet-32", 14, 1, 28, 464_154 - 2 * 9 * 16 + 4 * 65),
        ("resnet-18", 10, 3, 32, 11_173_962),
        ("resnet-18", 1000, 3, 224, 11_689_512),
        ("resnet-34", 1000, 3, 224, 21_797_672),
        ("resnet-34", 1000, 1, 224, 21_797_672 - 2 * 49 * 64),
        ("resnet-50", 1000, 3, 224, 25_557_032),
        ("resnet-50", 10, 3, 64, 23_520_842),
        ("darkcovidnet", 2, 3, 256, 1_164_434),
    ],
)
def test_published_parameter_counts(name, num_classes, in_channels, size, parameters):
    assert parameter_count(build_baseline(name, num_classes, in_channels, size)) == parameters


@pytest.mark.parametrize(("size", "kernel"), [(64, (3, 3)), (65, (7, 7))])
def test_stem_by_image_size(size, kernel):
    assert layers(build_baseline("resnet-18", 2, 3, size), nn.Conv2d)[0].kernel_size == kernel


def test_multiply_adds_of_resnet_32():
    """3·16·9 at 32², then ten convolutions a stage, each 16²·9 at 32², but for two first halves."""
    full = 16 * 16 * 9 * 32**2
    expected = 3 * 16 * 9 * 32**2 + 28 * full + 2 * full // 2 + 64 * 10
    assert multiply_adds(build_baseline("resnet-32", 10, 3, 32), torch.zeros(1, 3, 32, 32)) == (
        expected
    )
    assert round(expected / 1e9, 2) == 0.07


@pytest.mark.parametrize(
    ("name", "in_channels", "size"),
    [(name, channels, size) for name in BASELINES for channels, size in ((1, 28), (3, 32))]
    + [("resnet-32", 3, 64), ("resnet-18", 3, 64), ("darkcovidnet", 1, 64)]
    + [("resnet-18", 3, 224), ("darkcovidnet", 3, 224), ("darkcovidnet", 3, 4)],
)
def test_logits_have_the_promised_shape(name, in_channels, size):
    network = build_baseline(name, 5, in_channels, size).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, in_channels, size, size))
    assert logits.shape == (2, 5)
    assert isinstance(network.classifier, nn.Linear)
    assert network.classifier.out_features == 5


@pytest.mark.parametrize("name", ["resnet-32", "resnet-18", "darkcovidnet"])
def test_gradients_reach_every_parameter(name):
    network = build_baseline(name, 3, 1, 28)
    functional.cross_entropy(network(torch.randn(4, 1, 28, 28)), torch.arange(4) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def norm(x, gain, shift):
    """Batch norm by its formula."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]


def test_resnet_32_is_the_one_of_the_paper():
    """The paper's network as formulas, which take up the parameters in their order."""
    network = build_baseline("resnet-32", 10, 3, 32).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    parameters = iter(network.parameters())

    def conv_norm(x, stride=1):
        kernel, gain, shift = (next(parameters) for _ in range(3))
        return norm(functional.conv2d(x, kernel, stride=stride, padding=1), gain, shift)

    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    x = conv_norm(images).relu()
    for stage in range(3):
        for block in range(5):
            halves = stage > 0 and block == 0
            residual = conv_norm(conv_norm(x, 2 if halves else 1).relu())
            if halves:
                x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], dim=1)
            x = (x + residual).relu()
    weight, bias = parameters
    assert x.shape == (3, 64, 4, 4)
    torch.testing.assert_close(network(images), x.mean((2, 3)) @ weight.T + bias)


def test_resnet_32_starts_with_kaiming_normal_kernels():
    kernel = layers(build_baseline("resnet-32", 10, 3, 32), nn.Conv2d)[-1].weight
    assert kernel.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert kernel.mean().item() == pytest.approx(0, abs=2e-3)


def test_resnet_18_on_large_images_is_torchvision_s():
    network, peer = build_baseline("resnet-18", 7, 3, 65).eval(), resnet18(num_classes=7).eval()
    names = {
        name: name.removeprefix("features.").replace("classifier", "fc")
        for name in network.state_dict()
    }
    network.load_state_dict({name: peer.state_dict()[theirs] for name, theirs in names.items()})
    images = torch.randn(1, 3, 65, 65)
    torch.testing.assert_close(network(images), peer(images))


def test_resnet_on_small_images_keeps_the_resolution_of_the_first_stage():
    sizes = []
    network = build_baseline("resnet-18", 2, 1, 28).eval()
    for stage in (network.features.layer1, network.features.layer4):
        stage.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[2]))
    network(torch.zeros(1, 1, 28, 28))
    assert sizes == [28, 4]


def test_darkcovidnet_layers_are_the_published_ones():
    """(channels, height) of every convolution's output in the authors' summary."""
    published = [(8, 256), (16, 128), (32, 64), (16, 66), (32, 66), (64, 33), (32, 35), (64, 35)]
    published += [(128, 17), (64, 19), (128, 19), (256, 9), (128, 11), (256, 11)]
    published += [(128, 13), (256, 13), (2, 13)]
    found = []
    network = build_baseline("darkcovidnet", 2, 3, 256).eval()
    convolutions = layers(network, nn.Conv2d)
    for convolution in convolutions:
        convolution.register_forward_hook(lambda _m, _i, output: found.append(output.shape[1:3]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 256, 256))
    assert [tuple(shape) for shape in found] == published
    assert len(found) == 17
    assert all(convolution.bias is None for convolution in convolutions)
    assert network.classifier.in_features == 338
    assert {layer.negative_slope for layer in layers(network, nn.LeakyReLU)} == {0.1}


def test_darkcovidnet_ends_with_batch_norm_after_the_relu():
    features = build_baseline("darkcovidnet", 2, 1, 28).features(torch.randn(4, 1, 28, 28))
    maps = features.reshape(4, 2, -1)
    torch.testing.assert_close(maps.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.std((0, 2), correction=0), torch.ones(2), atol=1e-2, rtol=0)
    lowest = maps.amin((0, 2), keepdim=True)
    assert (maps == lowest).float().mean() > 0.1, "no pixels at the ReLU's zero"


def test_normalised_linear_is_the_cosine():
    layer = NormalisedLinear(16, 3)
    nn.init.normal_(layer.weight, std=5)
    x = 100 * torch.randn(6, 16)
    cosine = functional.cosine_similarity(x[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(layer(x), cosine)
    torch.testing.assert_close(layer(layer.weight).diagonal(), torch.ones(3))
    torch.testing.assert_close(layer(-layer.weight).diagonal(), -torch.ones(3))


def test_normalised_linear_starts_with_unit_vectors_of_uniform_elements():
    """Elements uniform in [−1, 1], over √(d/3): none above √(3/d), and variance 1/d."""
    weight = NormalisedLinear(4096, 8).weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(8))
    assert weight.abs().max().item() == pytest.approx((3 / 4096) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", ["resnet-32", "resnet-18", "darkcovidnet"])
def test_normalise_classifier_keeps_everything_else(name):
    network = build_baseline(name, 4, 1, 28).double().eval()
    before = deepcopy(network)
    normalise_classifier(network)
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    features = before.features(x)
    cosine = functional.cosine_similarity(features[:, None], network.classifier.weight[None], dim=2)
    torch.testing.assert_close(network(x), cosine)
    assert parameter_count(network) == parameter_count(before) - 4
    assert multiply_adds(network, x) == multiply_adds(before, x)


def test_unknown_network_lists_the_choices():
    with pytest.raises(InputError, match="'resnet-33'.*" + ", ".join(BASELINES)):
        build_baseline("resnet-33", 10, 3, 32)


def test_darkcovidnet_names_the_least_size():
    with pytest.raises(InputError, match=r"size: found 3; .* 4 pixels"):
        build_baseline("darkcovidnet", 2, 3, 3)


def test_a_network_of_two_classifiers_cannot_be_normalised():
    with pytest.raises(InputError, match=r"ldam-drw.*BilateralSupernet"):
        normalise_classifier(BilateralSupernet(2, 3, 3, "softmax", 1, 3))

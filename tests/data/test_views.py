"""Augmentation against brute force, invariants and hand-made images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssnas.config.schema import Views
from ssnas.data import views as augment
from ssnas.data.views import Normalise, crop_and_flip, views

OFF = Views(
    min_area=1.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    jitter_probability=0.0,
    grey_probability=0.0,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(n=6, height=5, width=7, channels=3):
    shape = (n, height, width, channels)
    return torch.randint(0, 256, shape, generator=seeded(1), dtype=torch.uint8)


def shifted_copies(image, padding, flip):
    """Every shift of the zero-padded image, mirrored or not: {bytes: (row, column, mirrored)}."""
    height, width, _ = image.shape
    padded = np.pad(image.numpy(), ((padding, padding), (padding, padding), (0, 0)))
    found = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            copy = padded[row : row + height, column : column + width]
            found[copy.tobytes()] = (row, column, False)
            if flip:
                found[np.ascontiguousarray(copy[:, ::-1]).tobytes()] = (row, column, True)
    return found


# Crop and flip


def test_without_padding_and_flip_nothing_changes():
    images = pixels()
    assert crop_and_flip(images, seeded(), 0, False).equal(images)


def test_flip_alone_mirrors_left_to_right():
    image = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.uint8).unsqueeze(-1)
    mirrored = torch.tensor([[[3, 2, 1], [6, 5, 4]]], dtype=torch.uint8).unsqueeze(-1)
    outcomes = {
        tuple(crop_and_flip(image, seeded(seed), 0, True).flatten().tolist()) for seed in range(20)
    }
    assert outcomes == {tuple(image.flatten().tolist()), tuple(mirrored.flatten().tolist())}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_shifts_of_the_padded_image(flip, channels):
    padding, images = 2, pixels(n=1, channels=channels).expand(400, -1, -1, -1)
    out = crop_and_flip(images, seeded(), padding, flip)
    assert (out.dtype, out.shape) == (images.dtype, images.shape)
    copies = shifted_copies(images[0], padding, flip)
    drawn = [copies[image.contiguous().numpy().tobytes()] for image in out]
    # 400 draws of 25 or 50 outcomes: each sample has its own, and none is missing.
    assert set(drawn) == set(copies.values())


def test_crops_keep_each_image_at_its_place():
    images = pixels()
    for image, out in zip(images, crop_and_flip(images, seeded(), 1, True), strict=True):
        assert out.contiguous().numpy().tobytes() in shifted_copies(image, 1, True)


def test_crops_follow_their_generator():
    images = pixels(n=16)
    first, again, other = (crop_and_flip(images, seeded(seed), 2, True) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


# Views


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_images_shape_and_range(channels):
    images = pixels(n=32, channels=channels)
    out = views(images, seeded(), replace(Views(), jitter_probability=1.0), True)
    assert (out.dtype, out.shape) == (torch.float32, (32, channels, 5, 7))
    assert out.min() >= 0
    assert out.max() <= 1
    assert out.isfinite().all()


def test_views_follow_their_generator():
    images = pixels(n=8)
    first, again, other = (views(images, seeded(seed), Views(), True) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_views_of_one_image_all_differ():
    images = pixels(n=1).expand(32, -1, -1, -1)
    out = views(images, seeded(), replace(Views(), jitter_probability=1.0), True)
    assert len(out.flatten(1).unique(dim=0)) == 32


def test_a_view_does_not_depend_on_the_other_images():
    images = pixels(n=8)
    changed = images.clone()
    changed[1:] = 255 - changed[1:]
    one, other = (views(x, seeded(), Views(), True) for x in (images, changed))
    assert one[0].equal(other[0])
    assert not one[1].equal(other[1])


def test_whole_area_and_no_strength_is_the_image(monkeypatch):
    monkeypatch.setattr(augment, "ASPECT_RATIO", 1.0)
    images = pixels(n=16, height=8, width=8)
    out = views(images, seeded(), OFF, False)
    torch.testing.assert_close(out, augment.unit(images), rtol=0, atol=1e-5)


def test_views_stay_inside_the_image():
    """A constant image stays constant: no border enters a crop."""
    images = torch.full((32, 8, 8, 3), 200, dtype=torch.uint8)
    out = views(images, seeded(), replace(OFF, min_area=0.2), True)
    torch.testing.assert_close(out, torch.full_like(out, 200 / 255))


def test_flip_mirrors_half_of_the_views():
    ramp = torch.arange(0, 256, 32, dtype=torch.uint8).view(1, 1, 8, 1).expand(400, 8, 8, 1)
    slope = {
        flip: views(ramp, seeded(), replace(OFF, min_area=0.5), flip)
        .diff(dim=3)
        .mean(dim=(1, 2, 3))
        for flip in (False, True)
    }
    assert (slope[False] > 0).all()
    assert 140 < (slope[True] < 0).sum() < 260


def test_jitter_happens_as_often_as_its_probability():
    images = torch.full((400, 2, 2, 1), 128, dtype=torch.uint8)
    settings = replace(OFF, brightness=0.9, jitter_probability=0.3)
    changed = (views(images, seeded(), settings, False) - 128 / 255).abs().amax((1, 2, 3)) > 1e-4
    assert 80 < changed.sum() < 160


def test_grey_conversion_weighs_by_luma():
    colour = torch.tensor([255, 102, 0], dtype=torch.uint8).expand(4, 2, 2, 3)
    out = views(colour, seeded(), replace(OFF, grey_probability=1.0), False)
    torch.testing.assert_close(out, torch.full_like(out, 0.299 + 0.587 * 0.4))


def test_brightness_scales_and_contrast_keeps_the_mean():
    x = 0.3 + 0.2 * torch.rand(64, 1, 4, 4, generator=seeded())
    scaled = augment._jitter(x, seeded(), replace(OFF, brightness=0.4)) / x
    factors = scaled.mean(dim=(1, 2, 3))
    torch.testing.assert_close(scaled, factors.view(-1, 1, 1, 1).expand_as(scaled))
    assert 0.6 <= factors.min() < 0.75 < 1.25 < factors.max() <= 1.4
    contrasted = augment._jitter(x, seeded(), replace(OFF, contrast=0.4))
    torch.testing.assert_close(contrasted.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert not contrasted.allclose(x)


@pytest.mark.parametrize("turns", [0.0, 1.0, -1.0])
def test_a_full_turn_of_the_hue_is_the_identity(turns):
    x = torch.rand(4, 3, 5, 5, generator=seeded())
    turned = augment._rotate_hue(x, torch.full((4, 1, 1, 1), turns))
    torch.testing.assert_close(turned, x, rtol=0, atol=1e-5)


def test_a_third_of_a_turn_of_the_hue_cycles_the_channels():
    x = torch.rand(2, 3, 4, 4, generator=seeded())
    turned = augment._rotate_hue(x, torch.full((2, 1, 1, 1), 1 / 3))
    torch.testing.assert_close(turned, x.roll(1, dims=1), rtol=0, atol=1e-5)


def test_the_hue_of_grey_stays_grey():
    x = torch.rand(8, 1, 4, 4, generator=seeded()).expand(-1, 3, -1, -1)
    turns = torch.rand(8, 1, 1, 1, generator=seeded())
    torch.testing.assert_close(augment._rotate_hue(x, turns), x.contiguous(), rtol=0, atol=1e-5)


# Normalise


def test_normalised_images_have_zero_mean_and_unit_variance():
    images = pixels(n=20)
    out = Normalise.of(images.numpy())(images)
    assert out.shape == (20, 3, 5, 7)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=(0, 2, 3), correction=0), torch.ones(3))


def test_a_constant_channel_stays_finite():
    images = pixels(n=4).clone()
    images[..., 1] = 51
    out = Normalise.of(images.numpy())(images)
    torch.testing.assert_close(out[:, 1], torch.zeros(4, 5, 7))
    torch.testing.assert_close(out[:, 0].var(correction=0), torch.tensor(1.0))

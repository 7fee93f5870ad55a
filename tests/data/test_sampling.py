"""Samplers: what they draw, and how often."""

import pytest
import torch

from ssnas.data.sampling import balanced, draw_batches, instance
from ssnas.errors import InputError

LABELS = torch.tensor([0] * 90 + [1] * 9 + [2])


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_instance_sampling_is_one_permutation_after_another():
    members = torch.tensor([3, 5, 8])
    drawn = instance(members, 8, random())
    assert sorted(drawn[:3].tolist()) == sorted(drawn[3:6].tolist()) == [3, 5, 8]
    assert len(set(drawn[6:].tolist())) == 2


def test_balanced_sampling_draws_classes_evenly_and_images_evenly_within():
    """30,000 draws: each class within 4 standard deviations of a third, each image likewise."""
    drawn = balanced(torch.arange(100), 30_000, random(), LABELS)
    classes = LABELS[drawn].bincount(minlength=3)
    deviation = (30_000 * (1 / 3) * (2 / 3)) ** 0.5
    assert (classes - 10_000).abs().max() < 4 * deviation
    images = drawn.bincount(minlength=100)
    assert images[99] == classes[2]
    assert (images[90:99] - 10_000 / 9).abs().max() < 4 * (10_000 / 9) ** 0.5
    assert (images[:90] - 10_000 / 90).abs().max() < 4.5 * (10_000 / 90) ** 0.5


def test_balanced_sampling_keeps_to_its_members():
    members = torch.tensor([0, 1, 91, 95])
    assert set(balanced(members, 200, random(), LABELS).tolist()) == {0, 1, 91, 95}


def test_batches_have_a_column_for_each_part_and_sampler():
    parts = [torch.arange(20), torch.arange(20, 100)]
    batches = draw_batches(parts, "bilateral", 16, random(), LABELS)
    assert batches.shape == (5, 16, 2, 2)
    assert batches[:, :, 0].max() < 20 <= batches[:, :, 1].min()
    assert sorted(batches[:, :, 1, 0].flatten().tolist()) == list(range(20, 100))
    classes = LABELS[batches[:, :, 1, 1]].flatten().bincount(minlength=3) / 80
    assert (classes - 1 / 3).abs().max() < 0.25


def test_the_short_last_batch_of_the_last_part_is_dropped():
    batches = draw_batches([torch.arange(3), torch.arange(3, 14)], "instance", 4, random())
    assert batches.shape == (2, 4, 2, 1)


@pytest.mark.parametrize("labels", [None, torch.ones(100, 2)])
def test_balanced_sampling_needs_one_label_an_image(labels):
    with pytest.raises(InputError, match=r"sampling: found 'balanced'.*instance"):
        draw_batches([torch.arange(100)], "balanced", 4, random(), labels)

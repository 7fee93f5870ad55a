"""Each step's inputs are those of its images, wherever a block or a training is cut."""

import pytest
import torch

from ssnas.config.schema import Training
from ssnas.data.views import Normalise
from ssnas.training import batches as batches_under_test
from ssnas.training.batches import BatchStream
from ssnas.training.images import TrainingImages


@pytest.fixture
def images(splits):
    few = splits.train.take(slice(0, 16))
    return TrainingImages(torch.from_numpy(few.images), Normalise.of(few.images), True)


class Numbers:
    """Draws the indices, with noise."""

    def __init__(self):
        self.sizes = []

    def draw(self, images, batch, random):
        self.sizes.append(len(batch))
        return batch, batch[:, 0] + torch.rand(len(batch), generator=random)


@pytest.mark.parametrize(("pixels", "sizes"), [(1, [12] * 5), (2 * 12 * 64, [24, 24, 12])])
def test_every_step_gets_what_was_drawn_for_its_images(images, monkeypatch, pixels, sizes):
    monkeypatch.setattr(batches_under_test, "BLOCK_PIXELS", pixels)
    batches = torch.arange(120).view(5, 3, 2, 4)[..., :2] % 16
    numbers = Numbers()
    stream = BatchStream(numbers, images, Training(), (0, 0), (0, 1))
    images_of_a_step = batches[0].numel()
    assert images_of_a_step == 12
    for step, batch in enumerate(batches):
        for part, (indices, noisy) in enumerate(stream.inputs(batches, 0, step)):
            assert indices.equal(batch[:, part])
            assert noisy.floor().equal(batch[:, part, 0].float())
    assert numbers.sizes == [size // 2 for size in sizes]


def test_draws_go_on_in_the_middle_of_a_block(images, monkeypatch):
    monkeypatch.setattr(batches_under_test, "BLOCK_PIXELS", 3 * 8 * 64)
    batches = torch.arange(80).view(10, 4, 2, 1) % 16

    def drawn(steps, seed=0, stream=1, epoch=2):
        inputs = BatchStream(Numbers(), images, Training(), (0, 0), (seed, stream)).inputs
        return [torch.cat([subset[1] for subset in inputs(batches, epoch, n)]) for n in steps]

    whole = drawn(range(10))
    for start in range(10):
        rest = drawn(range(start, 10))
        assert all(a.equal(b) for a, b in zip(rest, whole[start:], strict=True))
    noise = [x % 1 for x in (*whole, *drawn(range(10), epoch=3), *drawn(range(10), seed=1))]
    noise += [x % 1 for x in drawn(range(10), stream=2)]
    assert len({tuple(x.tolist()) for x in noise}) == 40

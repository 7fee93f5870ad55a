"""Tiny images and one thread for all tests: the nets are too small to share work."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from ssnas.data import Dataset, Splits
from ssnas.networks.genotype import Edge, Genotype

torch.set_num_threads(1)

# Random inputs are the same ones in every run, and a slow machine fails no test.
settings.register_profile(
    "bounded",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bounded")


@pytest.fixture
def in_threads():
    """Calls work(0.), work(1.), … in threads of their own at once, and waits for all."""

    def run(work):
        threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


@pytest.fixture
def splits():
    """Long-tailed random pixels (8x8 RGB) of three classes, whose brightness tells the class."""
    rng = np.random.default_rng(0)

    def draw(counts):
        labels = np.repeat(np.arange(3), counts)
        noise = rng.integers(0, 60, (len(labels), 8, 8, 3))
        images = (noise + 90 * labels[:, None, None, None]).astype(np.uint8)
        order = rng.permutation(len(labels))
        return Dataset(images[order], labels[order].astype(np.int64), ("dark", "grey", "light"))

    return Splits(draw([20, 8, 4]), draw([4, 4, 4]), draw([6, 6, 6]), {"source": "drawn"}, True)


@pytest.fixture
def multi_label(splits):
    """The same images; label 0: not dark, label 1: light."""

    def relabel(data):
        labels = np.stack([data.labels > 0, data.labels > 1], axis=1).astype(np.uint8)
        return Dataset(data.images, labels, ("not dark", "light"))

    parts = (relabel(part) for part in (splits.train, splits.val, splits.test))
    return Splits(*parts, splits.provenance, splits.flip)


@pytest.fixture
def genotype():
    """The cheapest network that still has a convolution."""
    cell = (Edge(0, 2, "skip_connect"), Edge(1, 2, "dil_conv_3x3"), Edge(2, 3, "skip_connect"))
    cell += (Edge(1, 4, "avg_pool_3x3"), Edge(0, 5, "skip_connect"))
    return Genotype(normal=cell, reduce=cell)

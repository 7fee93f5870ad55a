"""The memory that there is, and the estimate of a step, against sizes worked out by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssnas.config.schema import Search
from ssnas.engine.cpu.library import library
from ssnas.networks.bilateral import build_supernet
from ssnas.runtime.memory import available_memory, training_memory

ROOT = Path(__file__).resolve().parents[2]


def test_no_more_is_available_than_the_machine_has():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = 1024 * int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert 0 < available_memory(torch.device("cpu")) <= total
    assert available_memory(torch.device("meta")) is None


def test_a_convolution_keeps_its_input():
    def build():
        return nn.Conv2d(3, 5, 3, padding=1, bias=False)

    weights, inputs = 5 * 3 * 9, 2 * 3 * 8 * 8
    estimate = training_memory(build, lambda network, x: network(x), [2, 3, 8, 8])
    # The weights are kept for the backward pass, too.
    assert estimate == 4 * (inputs + weights + 3 * weights)


def supernet(channels):
    return build_supernet(Search(channels=channels), (32, 32, 3), None)


def forward(network, images):
    return network.features(images, network.architecture())


def test_a_batch_of_twice_the_size_keeps_twice_as_much():
    def estimate(batch, channels=4):
        return training_memory(lambda: supernet(channels), forward, [batch, 3, 16, 16])

    small, large = estimate(8), estimate(16)
    assert 1.9 < large / small < 2.01
    assert 1.9 < estimate(8, channels=8) / small < 2.2


STEP = """
import re, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from ssnas.config.schema import Search
from ssnas.networks.bilateral import build_supernet

def peak():  # ru_maxrss would be that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
network, images = build_supernet(Search(channels=8), (32, 32, 3), None), torch.rand(64, 3, 32, 32)
before = peak()
network.features(images, network.architecture()).sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("native", ["1", "0"])
def test_a_real_step_takes_what_is_estimated(native):
    """In a process of its own, whose peak grows: with the kernels by two fifths of it."""
    estimate = training_memory(lambda: supernet(8), forward, [64, 3, 32, 32])
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(root=str(ROOT))], capture_output=True, text=True,
        check=True, env=os.environ | {"SSNAS_NATIVE": native},
    )  # fmt: skip
    share = int(done.stdout) / estimate
    assert 0.3 < share < 0.55 if native == "1" and library() else 0.6 < share < 1.3

"""The choice of a device, and memory on machines that do not tell."""

import sys

import pytest
import torch

from ssnas.errors import InputError
from ssnas.runtime.device import choose_device, peak_memory_mb


# PyTorch's "meta" device is on every machine, and has as many numbers as one asks for.
@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        ("meta", None, "meta"),
        ("meta", "1", "meta:1"),
        ("meta:0", "1", "meta:0"),
        ("cpu", "1", "cpu"),
    ],
)
def test_each_process_takes_the_device_of_its_number(monkeypatch, name, rank, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(("accelerator", "expected"), [(None, "cpu"), ("meta", "meta:1")])
def test_the_accelerator_if_there_is_one(monkeypatch, accelerator, expected):
    device = accelerator and torch.device(accelerator)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert choose_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["no-such", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(
        InputError, match=f"device: '{name}' cannot be used here .*accepted is auto"
    ):
        choose_device(name)


def test_peak_memory_counts_what_the_process_has_used():
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(2**20 * (before + 64), dtype=torch.uint8)
    assert peak_memory_mb(torch.device("cpu")) >= held.nbytes / 2**20


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb(torch.device("cpu")) is None

"""The benchmark's command line at a tiny size: what it records, and that it compares equals."""

import json
import os

import pytest
import torch

from benchmarks import step

SIZES = {"channels": 4, "batch": 4, "cells": 3, "size": 8, "repeats": 1}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "new" / "step.json"
    sizes = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        # Importing PyTorch in four new processes would take longer than all the rest.
        patch.setattr(step, "in_fresh_process", lambda function, *arguments: function(*arguments))
        status = step.main([*sizes, "--threads", "1", "--device", "cpu", "--out", str(out)])
    torch.set_num_threads(threads)
    assert status == 0
    return json.loads(out.read_text())


def test_memory_is_measured_in_a_process_of_its_own():
    assert step.in_fresh_process(os.getpid) != os.getpid()


def test_records_where_and_what_was_measured(report):
    assert set(report["environment"]) == {
        *("device", "cpu", "cores", "threads", "python", "torch", "commit", "dirty"),
    }
    assert report["environment"]["threads"] == 1
    assert report["settings"] == {**SIZES, "amp": "off"}


@pytest.mark.parametrize(("what", "losses"), [("search", 2), ("finetune", 1)])
def test_compares_equal_systems(report, what, losses):
    result = report["results"][what]
    fast, plain = result["losses"]["fast"], result["losses"]["plain"]
    assert result["losses_agree"] and len(fast) == losses
    assert fast == pytest.approx(plain, rel=1e-3)
    for name in ("fast", "plain"):
        assert set(result[name]) == {"median_ms", "min_ms", "images_per_second", "peak_mb"}
    slower = result["plain"]["median_ms"] / result["fast"]["median_ms"]
    assert result["ratio"]["median_ms"] == pytest.approx(slower)

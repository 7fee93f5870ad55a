"""The benchmarks at a tiny size: what they record, and that they count and compare correctly."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from benchmarks import costs, gpu, large, measure, precision, profile, scaling, step
from benchmarks.measure import Setting, Timed
from benchmarks.systems import SearchStep, System, computing, systems_for
from ssnas.config.load import load_main
from ssnas.errors import InputError
from ssnas.networks.backbone import STEMS
from ssnas.networks.derived import multiply_adds
from ssnas.runtime.device import autocast

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = {"channels": 4, "cells": 3, "batch": 4, "size": 8}
SMALL = Setting(**SIZES, amp="off", graphs="off", threads=1, device="cpu")
OPTIONS = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
OPTIONS += ["--threads", "1", "--device", "cpu", "--repeats", "1"]


@pytest.fixture(autouse=True, scope="module")
def _cheap():
    """No new process, in which importing PyTorch would take longer than all the rest."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "in_fresh_process", lambda function, *given: function(*given))
        patch.setattr(costs, "MATRIX", {"cpu": 64})
        patch.setattr(costs, "COPIED_BYTES", {"cpu": 2**16})
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "new" / "step.json"
    assert step.main([*OPTIONS, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "scaling.json"
    sweeps = ["--sweep-channels", "--sweep-cells", "--sweep-size", "8", "--sweep-batch", "2", "4"]
    assert scaling.main([*OPTIONS, *sweeps, "--out", str(out)]) == 0
    return out


def test_memory_is_measured_in_a_process_of_its_own():
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        assert _own_in_fresh_process(os.getpid) != os.getpid()


_own_in_fresh_process = measure.in_fresh_process


def test_records_where_and_what_was_measured(report):
    assert {"device", "threads", "torch", "commit", "cores"} <= report["environment"].keys()
    assert report["environment"]["threads"] == 1
    assert report["settings"] == {**SIZES, "amp": "off", "graphs": "off"}


@pytest.mark.parametrize(("what", "losses"), [("search", 2), ("finetune", 1)])
def test_compares_equal_systems(report, what, losses):
    result = report["results"][what]
    fast, plain = result["losses"]["fast"], result["losses"]["plain"]
    assert result["losses_agree"] and len(fast) == losses
    assert fast == pytest.approx(plain, rel=1e-3)
    for name in ("fast", "plain"):
        row = result[name]
        assert row["images_per_second"] == pytest.approx(4e3 / row["median_ms"])
    slower = result["plain"]["median_ms"] / result["fast"]["median_ms"]
    assert result["ratio"]["median_ms"] == pytest.approx(slower)


@pytest.mark.parametrize(
    ("amp", "plain_loss", "agree"),
    [
        ("off", 1.0005, True),
        ("off", 1.01, False),
        ("bf16", 1.01, True),
        ("bf16", 1.2, False),
    ],
)
def test_losses_must_agree_within_their_precision(amp, plain_loss, agree):
    losses = {"fast": [1.0], "plain": [plain_loss]}
    assert step._agree(losses, {"fast": System(amp=amp), "plain": System(plain=True)}) is agree


def test_the_plain_twin_alone_computes_all_gradients():
    needed, everything = SearchStep(System(), SMALL), SearchStep(System(plain=True), SMALL)
    for step_ in (needed, everything):
        step_()
    # The step on ω comes last, and only the published way leaves α's gradient of it as well.
    alone = SearchStep(System(), SMALL)
    alone.halves()[0]()
    of_alpha = [alpha.grad for alpha in alone.bilevel.alpha]
    for own, first, other in zip(
        needed.bilevel.alpha, of_alpha, everything.bilevel.alpha, strict=True
    ):
        assert torch.allclose(own.grad, first)
        assert not torch.allclose(other.grad, first)


def test_a_system_leaves_the_project_as_it_was():
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    cpu = torch.device("cpu")
    with computing(System(plain=True, amp="bf16")), autocast(cpu):
        assert torch.backends.cudnn.benchmark
        assert torch.is_autocast_enabled("cpu")
    with autocast(cpu):
        assert not torch.is_autocast_enabled("cpu")
    assert flags == (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)


def test_every_ingredient_has_a_row_of_its_own():
    everything = Setting(**SIZES, amp="bf16", graphs="on", threads=1, device="cuda")
    systems = systems_for(everything)
    assert systems["fast"] == System(amp="bf16", graphs=True)
    assert systems["plain"] == System(plain=True)
    assert len(set(systems.values())) == len(systems) == 6
    assert list(systems_for(SMALL)) == ["fast", "plain"]


def test_graphs_need_cuda():
    with pytest.raises(InputError, match="--graphs"):
        step.main([*OPTIONS, "--graphs", "on"])


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_operations_of_a_convolution(groups):
    x = torch.randn(3, 6, 9, 7)
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
    # Each of the 3·6·9·7 outputs has 9·6/groups multiply-adds, of two operations each.
    forward = 2 * (3 * 6 * 9 * 7) * (9 * 6 // groups)
    assert costs.operations(lambda: layer(x)) == forward
    assert costs.operations(lambda: layer(x).sum().backward()) == 2 * forward
    x.requires_grad_()
    assert costs.operations(lambda: layer(x).sum().backward()) == 3 * forward


def test_operations_of_a_step_on_omega():
    small = replace(SMALL, batch=2)
    made = SearchStep(System(plain=True), small)
    supernet, config = made.bilevel.supernet, made.bilevel.config
    image = torch.randn(1, 3, 8, 8)
    # Forward, gradient of the input and gradient of the weight cost the same; images have none.
    network = 3 * multiply_adds(supernet, image) - multiply_adds(supernet.stem, image)
    projector = 3 * sum(
        layer.weight.numel()
        for layer in made.bilevel.objective.projector
        if hasattr(layer, "weight") and layer.weight is not None and layer.weight.ndim == 2
    )
    correlation = 3 * config.projector**2
    per_image = 2 * (network + projector) + correlation
    assert costs.operations(made.halves()[1]) == 2 * 2 * per_image


def test_saved_bytes_count_each_memory_once():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)

    def work():
        hidden = x @ weight  # saves x, 60 bytes, and the weight
        (hidden.exp() * hidden[:, :1]).sum().backward()  # exp's result, 40, and hidden, 40

    assert costs.saved_bytes(work, [weight]) == 60 + 40 + 40 - (40 - 20)


def test_the_bytes_of_a_step_grow_with_the_batch():
    one, two = costs.step_bytes(SMALL), costs.step_bytes(replace(SMALL, batch=8))
    assert 1.5 * one < two <= 2 * one


def test_scaling_records_what_its_picture_needs(swept):
    report = json.loads(swept.read_text())
    assert set(report["results"]) == {"batch", "size"}
    limits, points = report["limits"], report["results"]["batch"]
    assert list(points) == ["2", "4"]
    assert points["4"] == report["results"]["size"]["8"]
    for row in points.values():
        seconds = row["gflop"] / limits["gflop_per_second"]
        assert row["arithmetic_ms"] == pytest.approx(1e3 * seconds)
        seconds = row["moved_gb"] / limits["gb_per_second"]
        assert row["bandwidth_ms"] == pytest.approx(1e3 * seconds)
    assert points["4"]["gflop"] == pytest.approx(2 * points["2"]["gflop"])
    assert swept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    svg = swept.with_suffix(".svg").read_text()
    assert "image size" in svg and "arithmetic alone" in svg and "channels 4" in svg


def test_the_picture_leaves_out_what_did_not_fit(swept, tmp_path):
    report = json.loads(swept.read_text())
    report["results"]["batch"]["128"] = {"out_of_memory": True}
    scaling.draw(report, tmp_path / "a.png", tmp_path / "a.svg")
    assert ">128<" not in (tmp_path / "a.svg").read_text()


def test_profile_of_both_steps(tmp_path, monkeypatch):
    # Which operators are among the slowest is a matter of time.
    monkeypatch.setattr(profile, "ROWS", 1000)
    out = tmp_path / "profile.txt"
    assert profile.main([*OPTIONS, "--out", str(out)]) == 0
    text = out.read_text()
    assert "search step" in text and "finetune step" in text
    assert "native_batch_norm" in text and "channels: 4" in text


def test_profile_names_and_counts_operators():
    layer = nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6, bias=False)
    with profile.OperatorTimes() as times:
        for _ in range(2):
            layer(torch.randn(2, 6, 8, 8)).sum().backward()
    calls = Counter(run.name for run in times.runs)
    assert calls["convolution 5×5 depthwise dilation 2"] == 2
    assert calls["convolution_backward 5×5 depthwise dilation 2 of w"] == 2


def test_profile_table_gives_figures_of_one_step():
    runs = [*4 * [Timed("short", 0.0005)], *2 * [Timed("long", 0.003)]]
    lines = profile.table(runs, 2).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["3.000", "75.0%", "1.0", "long"],
        ["1.000", "25.0%", "2.0", "short"],
    ]


def test_profile_table_puts_the_fastest_together(monkeypatch):
    monkeypatch.setattr(profile, "ROWS", 1)
    runs = [Timed("long", 0.006), *3 * [Timed("short", 0.001)], Timed("shorter", 0.001)]
    lines = profile.table(runs, 1).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["6.000", "60.0%", "1.0", "long"],
        ["4.000", "40.0%", "4.0", "2", "others"],
    ]


def test_kernels_and_operators_of_the_profilers_events():
    def event(name, device_type, microseconds, annotation=False):
        return SimpleNamespace(
            name=name,
            device_type=device_type,
            self_device_time_total=microseconds,
            is_user_annotation=annotation,
        )

    kernels, operators = measure.runs_of(
        [
            event("aten::add", DeviceType.CPU, 30),
            event("aten::empty", DeviceType.CPU, 0),
            event("add_kernel", DeviceType.CUDA, 10),
            event("add_kernel", DeviceType.CUDA, 20),
            event("Optimizer.step", DeviceType.CUDA, 500, annotation=True),
        ]
    )
    assert kernels == [
        Timed("add_kernel", pytest.approx(1e-5)),
        Timed("add_kernel", pytest.approx(2e-5)),
    ]
    assert operators == [Timed("aten::add", pytest.approx(3e-5))]


def test_gpu_goes_on_with_what_is_missing(tmp_path):
    (tmp_path / "here.txt").write_text("")
    commands = {"here.txt": ("no_such_module",), "missing.txt": ("no_such_module",)}
    assert gpu.run_missing(tmp_path, commands, [], seconds=60) == 1
    assert gpu.run_missing(tmp_path, {"here.txt": ("no_such_module",)}, [], seconds=60) == 0


def test_gpu_plan_holds_every_size():
    plan = gpu.plan()
    assert {f"step-batch-{b}-cells-{c}.json" for b in (32, 256) for c in (3, 8)} < plan.keys()
    for module, *_options in plan.values():
        assert module.startswith("benchmarks.")


def test_large_images_are_measured_for_every_way_of_saving_memory(tmp_path):
    out = tmp_path / "large.json"
    assert large.main([*OPTIONS, "--size", "24", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert {name: row["options"] for name, row in results.items()} == large.WAYS
    assert all(row["seconds"] > 0 for row in results.values())
    for options in large.WAYS.values():
        supernet = SearchStep(System(), SMALL, **options).bilevel.supernet
        assert isinstance(supernet.stem, STEMS["imagenet"])
        assert supernet.checkpoint == options.get("checkpoint", False)
        assert supernet.cells[0].partial == options.get("partial", 1)


def test_precisions_differ_less_than_seeds_by_hand():
    def both(*losses):
        return {loss: list(losses) for loss in precision.LOSSES}

    found = {
        "off": {"0": both(1.0, 5.0), "1": both(3.0, 5.0)},
        "bf16": {"0": both(1.5, 5.0), "1": both(3.0, 4.0)},
    }
    compared = precision.comparison(found, "loss_alpha")
    # Distances 0.5, 0, 0 and 1; the seeds' standard deviations √2 and 0.
    assert compared == pytest.approx({"difference": 1.5 / 4, "noise": 2**0.5 / 2})


def test_both_precisions_are_searched_and_drawn(tmp_path, monkeypatch, splits):
    given = load_main(ROOT / "params.yaml")
    few = replace(given.search, channels=2, epochs=2, batch_size=8, projector=4)
    monkeypatch.setattr(precision, "load_main", lambda: replace(given, search=few))
    monkeypatch.setattr(precision, "read_splits", lambda _run: splits)
    out = tmp_path / "precision.json"
    assert precision.main(["--seeds", "2", "--device", "cpu", "--out", str(out)]) in (0, 1)
    report = json.loads(out.read_text())
    found = report["results"]
    assert report["settings"]["size"] == 8
    for loss in precision.LOSSES:
        for seed in ("0", "1"):
            plain, mixed = (found[amp][seed][loss] for amp in ("off", "bf16"))
            assert len(plain) == few.epochs
            assert plain != mixed
            assert mixed[0] == pytest.approx(plain[0], rel=0.5)
        assert found["off"]["0"][loss] != found["off"]["1"][loss]
    assert out.with_suffix(".png").stat().st_size > 10_000

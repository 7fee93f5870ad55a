"""Two gloo processes on the CPU do what one process does with the whole batch."""

import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ssnas.config.schema import Finetune, Search, Views
from ssnas.data import Dataset
from ssnas.data import views as augment
from ssnas.data.views import Normalise
from ssnas.engine.batch_norm import Norm, batch_norm
from ssnas.errors import InputError
from ssnas.finetune import fit
from ssnas.losses import barlow_twins, nt_xent
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import RELAXATIONS
from ssnas.runtime import distributed
from ssnas.search import search
from ssnas.training.images import TrainingData, TrainingImages

WORLD, BATCH, FEATURES = 2, 8, 5
pytestmark = pytest.mark.slow

LOSSES = {"barlow-twins": barlow_twins, "nt-xent": nt_xent}
NORMS = ("scaled", "affine", "vectors")
CPU = torch.device("cpu")
OPERATIONS = ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
SEARCH = Search(
    channels=4,
    stem_multiplier=1,
    epochs=1,
    batch_size=BATCH,
    projector=8,
    alpha_learning_rate=0.05,
    knn_every=0,
)
SEARCHES = {
    "barlow-twins": SEARCH,
    "second-order": replace(
        SEARCH, relaxation="softmax", objective="supervised", second_order=True, batch_size=16
    ),
}
FINETUNE = Finetune(epochs=2, batch_size=2 * BATCH)
TRAININGS = (*SEARCHES, "finetune")


def problem():
    random = torch.Generator().manual_seed(0)
    model = nn.Linear(FEATURES, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    views = torch.randn(2, BATCH, FEATURES, generator=random, dtype=torch.float64)
    return model, views


def gradients(loss):
    """The gradients of a loss that couples the samples, and of one that does not."""
    by_loss = []
    for couples in (True, False):
        model, views = problem()
        batch = distributed.shard(torch.arange(BATCH))
        outputs = [model(view[batch]) for view in views]
        if couples:
            loss(*map(distributed.gather, outputs)).backward()
        else:
            (outputs[0] - outputs[1]).square().sum(dim=1).mean().backward()
        distributed.average_gradients(model.parameters())
        by_loss.append([parameter.grad for parameter in model.parameters()])
    return by_loss


def normalised(kind):
    """The result of a batch norm of `kind` for a batch, with all its gradients and statistics."""
    random = torch.Generator().manual_seed(1)
    pixels = (3, 3) if kind != "vectors" else ()
    x = torch.randn(BATCH, 6, *pixels, generator=random, dtype=torch.float64)
    x[::3] += 5  # so that the processes' means differ
    direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
    x, direction = (distributed.shard(whole) for whole in (x, direction))
    norms = [Norm(3, affine=kind == "affine").double() for _ in range(2)]
    scale = None if kind == "affine" else torch.tensor([0.3, -2.0], dtype=torch.float64)
    of = [x, *([] if scale is None else [scale]), *(p for norm in norms for p in norm.parameters())]
    for tensor in of:
        tensor.requires_grad_()
    result = batch_norm(norms, x, scale)
    of_x, *others = torch.autograd.grad((result * direction).sum(), of)
    parts = {"result": result.detach(), "of_x": of_x}
    sums = {f"of_{i}": gradient for i, gradient in enumerate(others)}
    same = {f"{i}.{name}": b for i, norm in enumerate(norms) for name, b in norm.named_buffers()}
    return {"parts": parts, "sums": sums, "same": same}


def offset():
    """The result for a mean a thousand times the standard deviation, in float32."""
    x = 1e3 + torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    return batch_norm([Norm(3)], distributed.shard(x)).detach()


def data():
    """32 long-tailed images of random pixels, whose brightness tells the class."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [16, 10, 6])
    noise = random.integers(0, 90, (len(labels), 8, 8, 3))
    images = (noise + 50 * labels[:, None, None, None]).astype(np.uint8)
    return Dataset(images, labels.astype(np.int64), ("a", "b", "c"))


def in_double_precision():
    """And with few operations."""
    RELAXATIONS.update(sigmoid=OPERATIONS, softmax=("none", *OPERATIONS))
    torch.set_default_dtype(torch.float64)
    augment.unit = lambda images: images.permute(0, 3, 1, 2).double() / 255


def trained(name):
    """The weights and α, and the figures of every epoch, that a tiny training leaves."""
    images = data()
    normalise = Normalise.of(images.images)
    if name in SEARCHES:
        shown = TrainingImages.of(images, normalise, True, CPU)
        result = search(shown, SEARCHES[name], Views(), seed=0)
        return result.supernet.state_dict(), result.history
    torch.manual_seed(0)
    ops = ("sep_conv_3x3", "max_pool_3x3", "dil_conv_5x5", "skip_connect", "sep_conv_3x3")
    edges = ((0, 2), (1, 2), (2, 3), (0, 4), (1, 5))
    cell = tuple(Edge(*edge, op) for edge, op in zip(edges, ops, strict=True))
    network = DerivedNetwork(Genotype(cell, cell), 4, 3, 3, stem_multiplier=1)
    shown = TrainingData(images, images, normalise, True)
    result = fit(network, shown, FINETUNE, 0, CPU)
    return network.state_dict(), result.history


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(CPU):
        unused = nn.Linear(2, 2)
        distributed.average_gradients(unused.parameters())
        report = {
            "active": distributed.active(),
            "rank": distributed.rank(),
            "shard": distributed.shard(torch.arange(8)),
            "pairs": distributed.shard(torch.arange(16).view(8, 2)),
            "gathered": distributed.gather(distributed.shard(torch.arange(8).view(4, 2))),
            "unused": unused.weight.grad is None,
            "normalised": {kind: normalised(kind) for kind in NORMS},
            "offset": offset(),
            **{name: gradients(loss) for name, loss in LOSSES.items()},
        }
        in_double_precision()
        report["together"] = {name: trained(name) for name in TRAININGS}
    report["left"] = not dist.is_initialized()
    if rank == 0:
        report["alone"] = {name: trained(name) for name in TRAININGS}
    torch.save(report, folder / f"{rank}.pt")
    # The result is written: skip a teardown in which PyTorch's threads sometimes abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The reports of the two processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_the_group_lasts_as_long_as_its_context(processes):
    assert [report["rank"] for report in processes] == [0, 1]
    assert all(report["active"] and report["left"] for report in processes)


def test_shards_partition_a_batch(processes):
    rows = torch.cat([report["shard"] for report in processes])
    assert sorted(rows.tolist()) == list(range(8))
    for report in processes:
        assert report["pairs"][:, 0].equal(2 * report["shard"])
        assert report["pairs"][:, 1].equal(2 * report["shard"] + 1)


def test_an_uneven_batch_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="found 7 with 2 processes; accepted is a multiple of 2"):
        distributed.shard(torch.arange(7))


def test_gathered_rows_are_the_whole_batch(processes):
    assert all(report["gathered"].equal(torch.arange(8).view(4, 2)) for report in processes)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_whole_batch(processes, name):
    whole = gradients(LOSSES[name])
    for report in processes:
        for ours, theirs in zip(report[name], whole, strict=True):
            for gradient, expected in zip(ours, theirs, strict=True):
                # Biases shift all embeddings alike: Barlow Twins' gradient for them is 0.
                error = (gradient - expected).norm() / expected.norm().clamp(min=1e-6)
                assert error < 1e-5


@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm_is_that_of_the_whole_batch(processes, kind):
    whole = normalised(kind)
    for rank, report in enumerate(processes):
        ours = report["normalised"][kind]
        rows = {name: value[rank::WORLD] for name, value in whole["parts"].items()}
        torch.testing.assert_close(ours["parts"], rows)
        torch.testing.assert_close(ours["same"], whole["same"])
    both = [report["normalised"][kind] for report in processes]
    for name, expected in whole["sums"].items():
        torch.testing.assert_close(sum(ours["sums"][name] for ours in both), expected)
    for name, value in both[0]["same"].items():
        assert value.equal(both[1]["same"][name])


def test_batch_norm_keeps_its_digits_far_from_zero(processes):
    x = 1e3 + torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    for rank, report in enumerate(processes):
        exact = F.batch_norm(x.double(), None, None, training=True)[rank::WORLD]
        # A number near 1000 has 6e-5 of rounding in float32.
        torch.testing.assert_close(report["offset"].double(), exact, rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_one_process(processes, name):
    (weights, _), (others, _) = (report["together"][name] for report in processes)
    expected, alone = processes[0]["alone"][name]
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert weights[key].equal(others[key])
        error = (weights[key] - value).double().norm() / value.double().norm().clamp(min=1e-6)
        assert error < 1e-5, key
    rows = [report["together"][name][1] for report in processes]
    for ours, theirs, row in zip(*rows, alone, strict=True):
        for key in row.keys() - {"images_per_second"}:
            assert ours[key] == theirs[key] == pytest.approx(row[key], rel=1e-5), key


def test_parameters_without_gradients_are_left_alone(processes):
    assert all(report["unused"] for report in processes)


def test_a_single_process_is_left_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert not distributed.active()
        assert distributed.rank() == 0
        x = torch.arange(6.0).view(3, 2)
        assert distributed.shard(x) is x
        assert distributed.gather(x) is x
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        distributed.average_gradients([parameter])
        assert parameter.grad.equal(torch.ones(2))

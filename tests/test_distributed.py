"""Two gloo processes on the CPU do what one process does with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ssnas import distributed
from ssnas.errors import InputError
from ssnas.losses import barlow_twins, nt_xent

WORLD, BATCH, FEATURES = 2, 8, 5
LOSSES = {"barlow-twins": barlow_twins, "nt-xent": nt_xent}


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
    found = []
    for couples in (True, False):
        model, views = problem()
        batch = distributed.shard(torch.arange(BATCH))
        outputs = [model(view[batch]) for view in views]
        if couples:
            loss(*map(distributed.gather, outputs)).backward()
        else:
            (outputs[0] - outputs[1]).square().sum(dim=1).mean().backward()
        distributed.average_gradients(model.parameters())
        found.append([parameter.grad for parameter in model.parameters()])
    return found


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(torch.device("cpu")):
        unused = nn.Linear(2, 2)
        distributed.average_gradients(unused.parameters())
        found = {
            "active": distributed.active(),
            "rank": distributed.rank(),
            "shard": distributed.shard(torch.arange(8)),
            "pairs": distributed.shard(torch.arange(16).view(8, 2)),
            "gathered": distributed.gather(torch.full((2, 3), float(rank))),
            "unused": unused.weight.grad is None,
            **{name: gradients(loss) for name, loss in LOSSES.items()},
        }
    torch.save(found | {"left": not dist.is_initialized()}, folder / f"{rank}.pt")
    # The result is written: skip a teardown in which PyTorch's threads sometimes abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_the_group_lasts_as_long_as_its_context(processes):
    assert [found["rank"] for found in processes] == [0, 1]
    assert all(found["active"] and found["left"] for found in processes)


def test_shards_partition_a_batch(processes):
    rows = torch.cat([found["shard"] for found in processes])
    assert sorted(rows.tolist()) == list(range(8))
    for found in processes:
        assert found["pairs"][:, 0].equal(2 * found["shard"])
        assert found["pairs"][:, 1].equal(2 * found["shard"] + 1)


def test_an_uneven_batch_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="found 7 with 2 processes; accepted is a multiple of 2"):
        distributed.shard(torch.arange(7))


def test_gathered_rows_are_those_of_all_processes(processes):
    expected = torch.arange(2.0).repeat_interleave(2).view(4, 1).expand(4, 3)
    assert all(found["gathered"].equal(expected) for found in processes)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_whole_batch(processes, name):
    whole = gradients(LOSSES[name])
    for found in processes:
        for ours, theirs in zip(found[name], whole, strict=True):
            for gradient, expected in zip(ours, theirs, strict=True):
                # Biases shift all embeddings alike: Barlow Twins' gradient for them is 0.
                error = (gradient - expected).norm() / expected.norm().clamp(min=1e-6)
                assert error < 1e-5


def test_parameters_without_gradients_are_left_alone(processes):
    assert all(found["unused"] for found in processes)


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

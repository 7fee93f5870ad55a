"""Memory that is used again, against PyTorch's own."""

import gc
import mmap

import pytest
import torch

from ssnas.engine.cpu.buffer_pool import LINE, SLACK, SMALLEST, WASTE, Memory

SIZE = (4, 16, 32, 32)  # 256 KiB of float32


def page(x):
    """The page that x starts in."""
    return x.untyped_storage().data_ptr() // mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [SIZE, (3, 5, 7, 9), (1, 1, 300, 301)])
def test_tensors_are_those_of_pytorch(size, dtype):
    found = Memory().empty(size, dtype)
    expected = torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
    assert (found.shape, found.stride(), found.dtype) == (size, expected.stride(), dtype)
    assert not found._is_view()
    values = torch.randn(size, dtype=dtype)
    assert torch.equal(found.copy_(values), values)


def test_memory_is_used_again_when_nothing_refers_to_it():
    memory = Memory()
    x = memory.empty(SIZE, torch.float32)
    first, part = page(x), x[0]
    del x
    assert page(memory.empty(SIZE, torch.float32)) != first
    del part
    assert first in {page(x) for x in [memory.empty(SIZE, torch.float32) for _ in range(2)]}


def test_what_is_alive_is_never_given_away():
    memory, generator = Memory(), torch.Generator().manual_seed(0)
    alive = []
    for value in range(300):
        channels = int(torch.randint(4, 64, (), generator=generator))
        alive.append((memory.empty((4, channels, 32, 32), torch.float32).fill_(value), value))
        if len(alive) > 10:
            alive.pop(int(torch.randint(len(alive), (), generator=generator)))
        assert all((x == expected).all() for x, expected in alive)
    assert memory.kept <= SLACK * memory.peak


def test_neighbours_do_not_compete_for_the_same_lines_of_a_cache():
    memory = Memory()
    found = [memory.empty(SIZE, torch.float32) for _ in range(16)]
    starts = {x.data_ptr() % mmap.PAGESIZE for x in found}
    assert len(starts) == 16
    assert all(start % LINE == 0 for start in starts)


def test_a_tensor_does_not_take_much_more_than_it_needs():
    memory = Memory()
    large = page(memory.empty((1, 1, WASTE, SMALLEST), torch.float32))
    small = memory.empty((1, 1, 1, SMALLEST // 2), torch.float32)
    assert page(small) != large
    assert page(memory.empty((1, 1, 2, SMALLEST), torch.float32)) == large


def test_steady_use_needs_no_new_memory():
    memory = Memory()
    sizes = [(2, channels, 64, 64) for channels in (16, 48, 16, 32, 64)]
    kept = []
    for _ in range(4):
        step = [memory.empty(size, torch.float32) for size in sizes]
        memory.empty((2, 40, 64, 64), torch.float32)
        del step
        kept.append(memory.kept)
    assert len(set(kept)) == 1


def test_larger_images_replace_what_smaller_ones_left():
    memory = Memory()
    for side in (32, 64, 128, 256):
        step = [memory.empty((8, 16, side, side), torch.float32) for _ in range(4)]
        needed = sum(x.nbytes for x in step)
        del step
    assert memory.kept <= SLACK * needed + 4 * SLACK * mmap.PAGESIZE


def test_the_garbage_collector_returns_memory_too():
    memory = Memory()
    cycle = [memory.empty(SIZE, torch.float32)]
    first = page(cycle[0])
    cycle.append(cycle)
    del cycle
    assert page(memory.empty(SIZE, torch.float32)) != first
    gc.collect()
    assert first in {page(x) for x in [memory.empty(SIZE, torch.float32) for _ in range(2)]}


def test_threads_do_not_share_tensors(in_threads):
    memory, failed = Memory(), []

    def work(value):
        for _ in range(200):
            x = memory.empty(SIZE, torch.float32).fill_(value)
            if not (x == value).all():
                failed.append(value)

    in_threads(work)
    assert not failed

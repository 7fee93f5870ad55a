"""Programs of kernel calls, against what the calls are to compute."""

from itertools import pairwise

import pytest
import torch

from ssnas.engine.cpu import library as kernels
from ssnas.engine.cpu.tape import Region, Tape

compiled = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
LINE = 64 // torch.float64.itemsize


def values(count):
    return torch.arange(1, count + 1).double()


def own_memory(tape):
    return torch.full((tape.size,), torch.nan, dtype=torch.float64)


@compiled
def test_calls_follow_each_other():
    """`join` reads an array of regions, and the second one what the first has left in memory."""
    tape = Tape(torch.float64)
    x, y = tape.tensor((6,)), tape.tensor((6,))
    between = tape.empty(4)
    tape.call("join", [x.part(1, 2), x.part(4, 2)], 2, 2, between)
    tape.call("join", [between.part(2, 2), between.part(0, 2), x.part(0, 2)], 3, 2, y)
    for factor in (1, 10):
        given, found = factor * values(6), torch.zeros(6).double()
        tape.run(own_memory(tape), given, found)
        assert torch.equal(found, factor * torch.tensor([5, 6, 2, 3, 1, 2]).double())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_structures_arrive(dtype):
    """`record` reads an array of structures with a real number each."""
    tape = Tape(dtype)
    mean, var, batches, found = (tape.tensor((2,)) for _ in range(4))
    records = [
        (0.25, *(own.part(i, 1) for own in (mean, var)), batches, found.part(i, 1), found, 1, 3)
        for i in range(2)
    ]
    tape.call("record", records, 2)
    given = torch.tensor([4.0, 8.0], dtype=dtype)
    own = [torch.zeros(2, dtype=dtype) for _ in range(2)]
    count = torch.tensor(5)
    tape.run(None, *own, count, given)
    assert own[0].tolist() == [1, 2]
    assert own[1].tolist() == [1.5, 1.5]  # 0.25 · 4 · 3 / 2
    assert count == 7


@compiled
def test_places_of_the_program_before_are_places():
    first = Tape(torch.float64)
    x = first.tensor((3,))
    kept = first.empty(3)
    first.call("join", [x], 1, 3, kept)
    second = Tape(torch.float64, after=first)
    y, between = second.tensor((3,)), second.empty(3)
    second.call("join", [kept], 1, 3, between)
    second.call("join", [between], 1, 3, y)
    memory, found = own_memory(first), torch.zeros(3).double()
    first.run(memory, values(3))
    second.run(memory, None, own_memory(second), found)
    assert torch.equal(found, values(3))


def test_memory_is_given_out_once_and_again_when_it_is_free():
    generator = torch.Generator().manual_seed(0)
    tape = Tape(torch.float64)
    held: list[Region] = []
    for _ in range(400):
        if held and torch.rand((), generator=generator) < 0.5:
            tape.free(held.pop(int(torch.randint(len(held), (), generator=generator))))
        else:
            held.append(tape.empty(int(torch.randint(1, 200, (), generator=generator))))
        taken = sorted((region.start, region.start + region.count) for region in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert all(end <= tape.size for _, end in taken)
    tape.free(*held)
    assert tape.empty(tape.size - LINE).start == 0


def test_steady_use_needs_no_more_memory():
    tape = Tape(torch.float64)
    for _ in range(10):
        tape.free(*(tape.empty(count) for count in (100, 7, 300)))
    assert tape.size == sum(-(-count // LINE) + 1 for count in (100, 7, 300)) * LINE


def test_what_is_no_memory_is_not_given_back():
    tape = Tape(torch.float64)
    tape.free(tape.tensor((100,)))
    assert tape.empty(100).start == tape.empty(100).start - (13 + 1) * LINE


def test_images_begin_at_other_lines_of_a_page():
    tape = Tape(torch.float32)
    starts = [tape.empty(32, 16, 32, 32).start * 4 % 4096 for _ in range(64)]
    assert len(set(starts)) == 64


def test_places_within_a_place():
    x = Region(3, 100, (2, 6, 5, 4))
    assert (x.count, x.channels, x.pixels) == (240, 6, 40)
    assert x.part(7, 2) == Region(3, 107, (2,))
    assert x.parts([(2, 3), (4,)]) == [Region(3, 100, (2, 3)), Region(3, 106, (4,))]
    assert x.blocks(3) == [Region(3, start, (2, 2, 5, 4)) for start in (100, 102, 104)]


@compiled
def test_a_program_runs_in_several_threads_at_once(in_threads):
    tape = Tape(torch.float64)
    x, y = tape.tensor((1000,)), tape.tensor((1000,))
    for i in range(50):
        tape.call("join", [x.part(20 * i, 20)], 1, 20, y.part(20 * i, 20))
    failed = []

    def work(value):
        given = torch.full((1000,), value).double()
        for _ in range(200):
            found = torch.zeros(1000).double()
            tape.run(None, given, found)
            if not torch.equal(found, given):
                failed.append(value)

    in_threads(work)
    assert not failed


@compiled
def test_calls_can_be_timed(monkeypatch):
    tape = Tape(torch.float64)
    x = tape.tensor((1 << 20,))
    for count in (1, 1 << 20):
        tape.call("clear", x, count)
    observed = []
    monkeypatch.setattr(Tape, "observer", lambda *run: observed.append(run))
    tape.run(None, values(1 << 20))
    ((timed, seconds),) = observed
    assert timed is tape
    assert len(seconds) == 2 and min(seconds) > 0
    assert [call.kernel for call in tape.calls] == ["clear", "clear"]


@compiled
def test_a_program_grows():
    tape = Tape(torch.float64)
    x = tape.tensor((2,))
    for i in range(2):
        tape.call("clear", x.part(i, 1), 1)
        given = values(2)
        tape.run(None, given)
        assert given.count_nonzero() == 1 - i


def test_another_number_of_tensors_is_refused():
    with pytest.raises(ValueError, match="takes 1 tensors; found 2"):
        Tape(torch.float64).run(None, None)

"""Programs of kernel calls, against what the calls are to compute."""

from itertools import pairwise

import pytest
import torch

from ssnas.engine.cpu import library as kernels
from ssnas.engine.cpu.tape import Place, Program

compiled = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
LINE = 64 // torch.float64.itemsize


def values(count):
    return torch.arange(1, count + 1).double()


def own_memory(program):
    return torch.full((program.size,), torch.nan, dtype=torch.float64)


@compiled
def test_calls_follow_each_other():
    """`join` reads an array of places, and the second one what the first has left in memory."""
    program = Program(torch.float64)
    x, y = program.tensor((6,)), program.tensor((6,))
    between = program.empty(4)
    program.call("join", [x.part(1, 2), x.part(4, 2)], 2, 2, between)
    program.call("join", [between.part(2, 2), between.part(0, 2), x.part(0, 2)], 3, 2, y)
    for factor in (1, 10):
        given, found = factor * values(6), torch.zeros(6).double()
        program.run(own_memory(program), given, found)
        assert torch.equal(found, factor * torch.tensor([5, 6, 2, 3, 1, 2]).double())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_structures_arrive(dtype):
    """`record` reads an array of structures with a real number each."""
    program = Program(dtype)
    mean, var, batches, found = (program.tensor((2,)) for _ in range(4))
    records = [
        (0.25, *(own.part(i, 1) for own in (mean, var)), batches, found.part(i, 1), found, 1, 3)
        for i in range(2)
    ]
    program.call("record", records, 2)
    given = torch.tensor([4.0, 8.0], dtype=dtype)
    own = [torch.zeros(2, dtype=dtype) for _ in range(2)]
    count = torch.tensor(5)
    program.run(None, *own, count, given)
    assert own[0].tolist() == [1, 2]
    assert own[1].tolist() == [1.5, 1.5]  # 0.25 · 4 · 3 / 2
    assert count == 7


@compiled
def test_places_of_the_program_before_are_places():
    first = Program(torch.float64)
    x = first.tensor((3,))
    kept = first.empty(3)
    first.call("join", [x], 1, 3, kept)
    second = Program(torch.float64, after=first)
    y, between = second.tensor((3,)), second.empty(3)
    second.call("join", [kept], 1, 3, between)
    second.call("join", [between], 1, 3, y)
    memory, found = own_memory(first), torch.zeros(3).double()
    first.run(memory, values(3))
    second.run(memory, None, own_memory(second), found)
    assert torch.equal(found, values(3))


def test_memory_is_given_out_once_and_again_when_it_is_free():
    generator = torch.Generator().manual_seed(0)
    program = Program(torch.float64)
    held: list[Place] = []
    for _ in range(400):
        if held and torch.rand((), generator=generator) < 0.5:
            program.free(held.pop(int(torch.randint(len(held), (), generator=generator))))
        else:
            held.append(program.empty(int(torch.randint(1, 200, (), generator=generator))))
        taken = sorted((place.start, place.start + place.count) for place in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert all(end <= program.size for _, end in taken)
    program.free(*held)
    assert program.empty(program.size - LINE).start == 0


def test_steady_use_needs_no_more_memory():
    program = Program(torch.float64)
    for _ in range(10):
        program.free(*(program.empty(count) for count in (100, 7, 300)))
    assert program.size == sum(-(-count // LINE) + 1 for count in (100, 7, 300)) * LINE


def test_what_is_no_memory_is_not_given_back():
    program = Program(torch.float64)
    program.free(program.tensor((100,)))
    assert program.empty(100).start == program.empty(100).start - (13 + 1) * LINE


def test_images_begin_at_other_lines_of_a_page():
    program = Program(torch.float32)
    starts = [program.empty(32, 16, 32, 32).start * 4 % 4096 for _ in range(64)]
    assert len(set(starts)) == 64


def test_places_within_a_place():
    x = Place(3, 100, (2, 6, 5, 4))
    assert (x.count, x.channels, x.pixels) == (240, 6, 40)
    assert x.part(7, 2) == Place(3, 107, (2,))
    assert x.parts([(2, 3), (4,)]) == [Place(3, 100, (2, 3)), Place(3, 106, (4,))]
    assert x.blocks(3) == [Place(3, start, (2, 2, 5, 4)) for start in (100, 102, 104)]


@compiled
def test_a_program_runs_in_several_threads_at_once(in_threads):
    program = Program(torch.float64)
    x, y = program.tensor((1000,)), program.tensor((1000,))
    for i in range(50):
        program.call("join", [x.part(20 * i, 20)], 1, 20, y.part(20 * i, 20))
    failed = []

    def work(value):
        given = torch.full((1000,), value).double()
        for _ in range(200):
            found = torch.zeros(1000).double()
            program.run(None, given, found)
            if not torch.equal(found, given):
                failed.append(value)

    in_threads(work)
    assert not failed


@compiled
def test_calls_can_be_timed():
    program = Program(torch.float64)
    x = program.tensor((1 << 20,))
    for count in (1, 1 << 20):
        program.call("clear", x, count)
    seconds = []
    program.run(None, values(1 << 20), seconds=seconds)
    assert len(seconds) == 2 and min(seconds) > 0
    assert [call.kernel for call in program.calls] == ["clear", "clear"]


@compiled
def test_a_program_grows():
    program = Program(torch.float64)
    x = program.tensor((2,))
    for i in range(2):
        program.call("clear", x.part(i, 1), 1)
        given = values(2)
        program.run(None, given)
        assert given.count_nonzero() == 1 - i


def test_another_number_of_tensors_is_refused():
    with pytest.raises(ValueError, match="takes 1 tensors; found 2"):
        Program(torch.float64).run(None, None)

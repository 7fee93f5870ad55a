"""The work and the memory traffic that a search step needs, and the machine's limits of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import Setting, seconds_of
from benchmarks.systems import SearchStep, System, computing

TRIALS = 5
COUNTED_BATCH = 2
MATRIX = {"cpu": 2048, "cuda": 8192}
CONVOLVED, CONVOLVED_SIZE = 256, 32
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}


def arithmetic_limit(setting: Setting) -> float:
    """Measure the floating-point operations a second, two for a multiply-add, of the fastest work.

    That is the best of several n×n products and several 3×3 convolutions of as much work: a library
    may not use a processor's widest vectors for one of them. In bfloat16 with `amp` bf16. Otherwise
    in float32, but with TF32 wherever PyTorch lets cuDNN's convolutions use it, since those could
    go beyond float32's limit.
    """
    device = torch.device(setting.device)
    n = MATRIX["cpu" if device.type == "cpu" else "cuda"]
    dtype = torch.bfloat16 if setting.amp == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    # 9 C² multiply-adds for each pixel of which there are n³ / 9 C².
    images = n**3 // (9 * CONVOLVED**2 * CONVOLVED_SIZE**2)
    x = torch.randn(images, CONVOLVED, CONVOLVED_SIZE, CONVOLVED_SIZE, device=device, dtype=dtype)
    kernel = torch.randn(CONVOLVED, CONVOLVED, 3, 3, device=device, dtype=dtype)
    x, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (x, kernel))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        multiplying = _best(lambda: torch.mm(a, b, out=product), device)
        convolving = _best(lambda: torch.conv2d(x, kernel, padding=1), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    convolved = 9 * CONVOLVED**2 * images * CONVOLVED_SIZE**2
    return 2 * max(n**3 / multiplying, convolved / convolving)


def bandwidth_limit(setting: Setting) -> float:
    """Measure the bytes a second, read and written, of the best copy within the memory."""
    device = torch.device(setting.device)
    size = COPIED_BYTES["cpu" if device.type == "cpu" else "cuda"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    return min(seconds_of(work, device) for _ in range(TRIALS + 1))


class _Operations(TorchDispatchMode):
    """Adds up PyTorch's counts, but for the one that takes a grouped convolution for a dense one.

    `FlopCounterMode` also attributes them to modules, by hooks that take longer than the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator.overloadpacket is torch.ops.aten.convolution_backward:
            gradient, _x, weight, *_others, wanted = args
            # Each of the gradients of input and weight costs what the convolution itself did.
            self.total += sum(wanted[:2]) * 2 * gradient.numel() * weight[0].numel()
        elif operator.overloadpacket in flop_registry:
            count = flop_registry[operator.overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def operations(work: Callable[[], object]) -> int:
    """Count the floating-point operations of the convolutions and matrix products of `work`.

    A multiply-add counts as two. Batch norm, pooling, activations and sums are left out.
    """
    with _Operations() as counter:
        work()
    return counter.total


def step_operations(setting: Setting) -> int:
    """Count the floating-point operations that one search step needs, see `operations`.

    Counted on the definition of the network, whose convolutions are neither rearranged nor padded,
    but without the gradients that a step does not need. All of them grow with the batch, so that
    a small one is counted, on the CPU.
    """
    small = replace(setting, batch=COUNTED_BATCH, device="cpu", amp="off", graphs="off")
    return _counted(small) * setting.batch // COUNTED_BATCH


@cache
def _counted(setting: Setting) -> int:
    return sum(map(operations, SearchStep(System(plain=True), setting).halves()))


def saved_bytes(work: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Count the bytes that `work` saves for its backward pass; `parameters` do not count.

    A tensor that several operations save counts once, and so do views of one memory.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            size = min(tensor.numel() * tensor.element_size(), memory.nbytes())
            sizes[memory.data_ptr()] = max(size, sizes.get(memory.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


def step_bytes(setting: Setting) -> int:
    """Count the least bytes that one search step, as implemented, moves to and from memory.

    What the forward passes keep for the backward passes is written once and read once. All else,
    as temporaries, second reads, gradients and weights, is left out.
    """
    step = SearchStep(System(amp=setting.amp), setting)
    parameters = [*step.bilevel.omega, *step.bilevel.alpha]
    with computing(step.system):
        return 2 * sum(saved_bytes(half, parameters) for half in step.halves())

"""A training step as a CUDA graph: recorded once, then replayed by a single launch.

At a batch of 32 a GPU computes the kernels of a step faster than Python launches them. A graph
holds all of them, with the addresses that they read and write.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3


class Captured:
    """A function of tensors whose work is the same list of kernels at every call.

    On CUDA the first calls run as they are, so that optimisers, libraries and constants make what
    they keep. The next one records the kernels, which executes none of them; it and every later
    call copy their inputs to where the graph reads, and replay it. On other devices every call
    is a plain one. Either way a call does the function's work exactly once.

    `SSNAS_GRAPHS=0` in the environment makes all calls plain ones.

    Python runs while recording and never again. Hence the function must

    - take what changes between calls from its inputs, or from tensors that others change in place,
      as learning rates are;
    - change its own state in place;
    - neither wait for the device nor copy from the host.

    Args:
        function: of tensors on one device, of the same shapes at every call, and of integers, in
            place of which a graph reads tensors without dimensions; returns tensors by name.
        enabled: whether to record at all.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], enabled: bool = True) -> None:
        self.function, self.enabled = function, enabled
        self._plain_calls = 0
        self._static: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | int) -> dict[str, Tensor]:
        if not (self.enabled and self._recordable(inputs)):
            return self.function(*inputs)
        if self._replay is not None:
            for own, given in zip(self._static, inputs, strict=True):
                _put(own, given)
        elif self._plain_calls < WARM_UP:
            self._plain_calls += 1
            return self._warm_up(inputs)
        else:
            self._static = _copies(inputs)
            self._replay, self._outputs = self._record(self._static)
        self._replay()
        # The next replay writes its outputs to the same places.
        return {name: output.clone() for name, output in self._outputs.items()}

    @staticmethod
    def _recordable(inputs: tuple[Tensor | int, ...]) -> bool:
        return _device(inputs).type == "cuda" and os.environ.get("SSNAS_GRAPHS") != "0"

    def _warm_up(self, inputs: tuple[Tensor | int, ...]) -> dict[str, Tensor]:
        """One call on a stream of its own: autograd would tie later ones to the default stream."""
        with torch.cuda.device(_device(inputs)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return {name: output.clone() for name, output in outputs.items()}

    def _record(self, inputs: list[Tensor]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """What replays the function's work on these very tensors, and where its outputs are."""
        with torch.cuda.device(_device(inputs)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.function(*inputs)
        return graph.replay, outputs


def _device(inputs: list[Tensor] | tuple[Tensor | int, ...]) -> torch.device:
    return next(x.device for x in inputs if isinstance(x, Tensor))


def _copies(inputs: tuple[Tensor | int, ...]) -> list[Tensor]:
    device = _device(inputs)
    return [
        x.clone() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs
    ]


def _put(own: Tensor, given: Tensor | int) -> None:
    if isinstance(given, int):
        own.fill_(given)
    elif given.shape == own.shape:
        own.copy_(given)
    else:
        raise ValueError(
            f"captured for inputs of shape {tuple(own.shape)}; found {tuple(given.shape)}"
        )

"""A training step as a CUDA graph: recorded once, then replayed by a single launch.

At a batch of 32 a GPU computes the kernels of a step faster than Python launches them. A graph
holds all of them, with the addresses that they read and write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3


class GraphedStep:
    """A step that always runs the same list of kernels, replayed as a CUDA graph.

    On CUDA the first `WARM_UP` calls run as they are, so that optimisers, libraries and constants
    make what they keep. The next call records the kernels, which executes none of them; it and
    every later call copy their inputs to where the graph reads, and replay it. On other devices
    every call is a plain one. Either way a call does the step's work exactly once.

    `SSNAS_GRAPHS=0` in the environment makes all calls plain ones.

    Python runs while the graph is recorded and never again. Hence the step must

    - take what changes between calls from its inputs, or from tensors that others change in place,
      as learning rates are;
    - change its own state in place;
    - neither wait for the device nor copy from the host.

    Args:
        step: a function of tensors on one device, which have the same shapes at every call, and of
            integers, in whose place the graph reads tensors without dimensions. It returns tensors
            by name.
        enabled: record at all; if not, every call is a plain one.

    Example:
        >>> double = GraphedStep(lambda x: {"double": 2 * x})
        >>> double(torch.tensor([1.0, 3.0]))
        {'double': tensor([2., 6.])}
    """

    def __init__(self, step: Callable[..., dict[str, Tensor]], enabled: bool = True) -> None:
        self.step, self.enabled = step, enabled
        self._plain_calls = 0
        self._graph_inputs: list[Tensor] = []
        self._graph_outputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | int) -> dict[str, Tensor]:
        """Take one step.

        Raises:
            ValueError: for an input of another shape than the recorded one.
        """
        if not (self.enabled and self._recordable(inputs)):
            return self.step(*inputs)
        if self._replay is not None:
            for target, value in zip(self._graph_inputs, inputs, strict=True):
                _write(target, value)
        elif self._plain_calls < WARM_UP:
            self._plain_calls += 1
            return self._warm_up(inputs)
        else:
            self._graph_inputs = _copies(inputs)
            self._replay, self._graph_outputs = self._record(self._graph_inputs)
        self._replay()
        # The next replay writes its outputs to the same addresses.
        return {name: output.clone() for name, output in self._graph_outputs.items()}

    @staticmethod
    def _recordable(inputs: Sequence[Tensor | int]) -> bool:
        return _device(inputs).type == "cuda" and os.environ.get("SSNAS_GRAPHS") != "0"

    def _warm_up(self, inputs: Sequence[Tensor | int]) -> dict[str, Tensor]:
        """Take a plain step on a side stream: autograd would tie later ones to the default one."""
        with torch.cuda.device(_device(inputs)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return {name: output.clone() for name, output in outputs.items()}

    def _record(self, inputs: list[Tensor]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """Record the step on these very tensors; give the replay and the tensors it writes."""
        with torch.cuda.device(_device(inputs)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.step(*inputs)
        return graph.replay, outputs


def _device(inputs: Sequence[Tensor | int]) -> torch.device:
    return next(x.device for x in inputs if isinstance(x, Tensor))


def _copies(inputs: Sequence[Tensor | int]) -> list[Tensor]:
    device = _device(inputs)
    return [
        x.clone() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs
    ]


def _write(target: Tensor, value: Tensor | int) -> None:
    if isinstance(value, int):
        target.fill_(value)
    elif value.shape == target.shape:
        target.copy_(value)
    else:
        raise ValueError(
            f"captured for inputs of shape {tuple(target.shape)}; found {tuple(value.shape)}"
        )

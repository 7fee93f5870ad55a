"""The identity of the work that trains an artifact: what it is made from, and what computes it.

A module of its own, so that stages that train nothing do not depend on the kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from ssnas.config.schema import Run
from ssnas.engine.cpu.library import library
from ssnas.pipeline.lineage import made_from


def computed_by(device: torch.device) -> dict[str, Any]:
    """Name what rounds a training's figures: the kind of device, and on a CPU the kernels.

    A training that goes on with others would end with other weights.
    """
    kernels = device.type == "cpu" and library() is not None
    return {"device": device.type, "compiled_kernels": kernels}


def identity(run: Run, name: str, device: torch.device) -> dict[str, Any]:
    """Describe the work that trains an artifact, for its checkpoint."""
    return {**made_from(run, name), "computed_by": computed_by(device)}

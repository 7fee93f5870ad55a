"""A watch over the modules that the engine stands in for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GLOBAL = nn.modules.module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Modules that the engine computes instead of calling them.

    It is asked at every step, so it keeps the tables that it looks at.

    Args:
        owners: the modules, with all that they contain.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> watch, x = Watch([layer]), torch.ones(1, 2)
        >>> watch.allows(x)
        True
        >>> hook = layer.register_forward_hook(print)
        >>> watch.allows(x)
        False
    """

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        self.owners = list(owners)
        modules = [module for owner in owners for module in owner.modules()]
        self._kinds = [(module, module.__class__) for module in modules]
        self._tables = [module._modules for module in modules]
        self._children = self._all_children()
        self._attributes = [vars(module) for module in modules]
        self._hooks = [getattr(module, kind) for module in modules for kind in _HOOKS]
        self._norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]

    def _all_children(self) -> list[nn.Module | None]:
        return [child for table in self._tables for child in table.values()]

    def changed(self) -> bool:
        """Tell whether a module was exchanged, or its class, since the watch began."""
        return self._children != self._all_children() or any(
            module.__class__ is not kind for module, kind in self._kinds
        )

    def allows(self, x: Tensor) -> bool:
        """Tell whether the engine may compute on x.

        It may not where a `forward` was set on a module, where a hook or a tracer wants to see
        every module called, under a transformation of `torch.func`, for tensors that are no plain
        ones, and where batch norms are in several modes.
        """
        if type(x) is not Tensor or transformed() or _tracing():
            return False
        if any(self._hooks) or any(getattr(_GLOBAL, f"_global{kind}") for kind in _HOOKS):
            return False
        if any("forward" in attributes for attributes in self._attributes):
            return False
        modes = {(n.training, n.track_running_stats, n.momentum, n.eps) for n in self._norms}
        return len(modes) < 2


def _tracing() -> bool:
    return bool(torch._C._get_tracing_state())


def transformed() -> bool:
    """Tell whether a transformation of `torch.func` is under way."""
    return torch._C._are_functorch_transforms_active()

"""Self-supervised differentiable architecture search for imbalanced image data.

The public names below are imported from their modules when they are first used, so that
`import ssnas` alone costs nothing.

Example:
    >>> import ssnas
    >>> ssnas.Supernet.__module__
    'ssnas.networks.supernet'
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssnas import decision, losses, metrics
    from ssnas.data.longtail import class_counts
    from ssnas.errors import InputError
    from ssnas.model import Model, load
    from ssnas.networks.derived import DerivedNetwork, Network
    from ssnas.networks.genotype import Genotype, derive
    from ssnas.networks.supernet import Supernet
    from ssnas.pipeline.classifier import Classifier
    from ssnas.pipeline.fit import fit

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "DerivedNetwork",
    "Genotype",
    "InputError",
    "Model",
    "Network",
    "Supernet",
    "__version__",
    "class_counts",
    "decision",
    "derive",
    "fit",
    "load",
    "losses",
    "metrics",
]

_MODULES = {
    "Classifier": "ssnas.pipeline.classifier",
    "fit": "ssnas.pipeline.fit",
    "Model": "ssnas.model",
    "load": "ssnas.model",
    "class_counts": "ssnas.data.longtail",
    "Genotype": "ssnas.networks.genotype",
    "InputError": "ssnas.errors",
    "DerivedNetwork": "ssnas.networks.derived",
    "Network": "ssnas.networks.derived",
    "Supernet": "ssnas.networks.supernet",
    "derive": "ssnas.networks.genotype",
}


_SUBMODULES = ("decision", "losses", "metrics")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"ssnas.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

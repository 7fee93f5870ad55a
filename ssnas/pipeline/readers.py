"""Readers of what the stages before left; each compares its lineage first."""

from torch import Tensor, nn

from ssnas.config.recipes import shaped
from ssnas.config.schema import Run
from ssnas.data.splits import read
from ssnas.data.types import Dataset, Splits
from ssnas.networks.factory import build_network
from ssnas.networks.genotype import Genotype
from ssnas.pipeline.artifacts import load_weights
from ssnas.pipeline.lineage import verified


def read_splits(run: Run) -> Splits:
    """Read the run's training, validation and test images.

    Raises:
        InputError: if their file is missing, damaged, or made from something else.
    """
    return read(verified(run, "splits"))


def network_of(run: Run, data: Dataset) -> nn.Module:
    """Build the run's network for these images and classes.

    Raises:
        InputError: if the genotype is missing or made from something else, or the search has no
            such network.
    """
    height, width, channels = data.images.shape[1:]
    return build_network(
        run.finetune,
        shaped(run.search, len(data), height),
        genotype_of(run),
        data.num_classes,
        (height, width, channels),
    )


def genotype_of(run: Run) -> Genotype | None:
    """Read the genotype of the run's network; None for a network that has none.

    Raises:
        InputError: if it is missing, damaged, or made from something else.
    """
    if run.finetune.network != "derived":
        return None
    return Genotype.read(verified(run, "genotype"))


def searched_weights(run: Run) -> dict[str, Tensor] | None:
    """Load the weights of the run's search, if it has one.

    Raises:
        InputError: if the file is missing, damaged, or made from something else.
    """
    if "searches" not in run.folders:
        return None
    return load_weights(verified(run, "supernet"))


def finetuned_weights(run: Run) -> dict[str, Tensor]:
    """Load the weights of the run's trained network.

    Raises:
        InputError: if the file is missing, damaged, or made from something else.
    """
    return load_weights(verified(run, "network"))

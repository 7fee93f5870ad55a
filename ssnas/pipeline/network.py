"""The network of a run, and the weights that it starts from, as the stages before left them."""

from torch import Tensor, nn

from ssnas.config.schema import Run
from ssnas.data.types import Dataset
from ssnas.networks.factory import build_network
from ssnas.networks.genotype import Genotype
from ssnas.pipeline.artifacts import Places, load_weights, search_description


def network_of(run: Run, data: Dataset) -> nn.Module:
    """Build the run's network for these images and classes.

    Raises:
        InputError: if the genotype is missing, or the search has no such network.
    """
    height, width, channels = data.images.shape[1:]
    return build_network(
        run.finetune, run.search, genotype_of(run), data.num_classes, (height, width, channels)
    )


def genotype_of(run: Run) -> Genotype | None:
    """Read the genotype of the run's network; None for a network that has none.

    Raises:
        InputError: if it is missing.
    """
    if run.finetune.network != "derived":
        return None
    return Genotype.read(Places.of(run).metrics("searches", "genotype.json"))


def searched_weights(run: Run) -> dict[str, Tensor] | None:
    """Load the weights of the run's search, if it has one.

    Raises:
        InputError: if the file is missing, damaged, or made with other parameters or data.
    """
    if "searches" not in run.folders:
        return None
    return load_weights(Places.of(run).supernet, search_description(run))

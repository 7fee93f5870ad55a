"""The network of a run: its derived genotype at the size that was searched."""

from ssnas.artifacts import Places, read_genotype
from ssnas.config import Run
from ssnas.datasets import Dataset
from ssnas.network import Network


def build_network(run: Run, data: Dataset) -> Network:
    """The network of the run's genotype for these images and classes."""
    return Network(
        read_genotype(Places(run.folders).metrics("searches", "genotype.json")),
        run.search.channels,
        run.search.cells,
        data.num_classes,
        data.images.shape[-1],
        run.search.stem_multiplier,
    )

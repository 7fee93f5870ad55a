"""The network that a run trains."""

from torch import nn

from ssnas.artifacts import Places, load_weights, read_genotype, search_description
from ssnas.config.schema import Run
from ssnas.data import Dataset
from ssnas.errors import InputError
from ssnas.networks.baselines import BASELINES, build_baseline, normalise_classifier
from ssnas.networks.bilateral import build_supernet
from ssnas.networks.derived import Network, inherit

NETWORKS = ("derived", "supernet", *BASELINES)


def build_network(run: Run, data: Dataset) -> nn.Module:
    """The network of `finetune.network` for these images and classes.

    LDAM's logits are cosines, so its classifier is a normalised one (Cao et al. 2019).

    Raises:
        InputError: if the search has no such network, or an option does not go with it.
    """
    config, in_channels = run.finetune, data.images.shape[-1]
    _check_options(run)
    if config.network in BASELINES:
        network = build_baseline(
            config.network, data.num_classes, in_channels, data.images.shape[1]
        )
    elif config.network == "supernet":
        return build_supernet(run.search, in_channels, data.num_classes)
    else:
        network = Network(
            read_genotype(Places(run.folders).metrics("searches", "genotype.json")),
            config.channels or run.search.channels,
            config.cells or run.search.cells,
            data.num_classes,
            in_channels,
            run.search.stem_multiplier,
            run.search.stem,
        )
    if config.loss == "ldam-drw":
        normalise_classifier(network)
    return network


def _check_options(run: Run) -> None:
    """Refuse what would otherwise be ignored, or fail far from its cause."""
    config = run.finetune
    if config.network == "derived":
        return
    for key in ("cells", "channels", "pretrain_epochs"):
        if getattr(config, key):
            raise InputError(
                f"finetune.{key}: found {getattr(config, key)} with network {config.network!r}; "
                "accepted with network derived alone"
            )
    if config.network != "supernet":
        return
    if run.search.objective != "supervised":
        raise InputError(
            "finetune.network: found 'supernet' of a self-supervised search, which has no "
            "classifier; accepted with search.objective supervised"
        )
    if config.loss == "ldam-drw" or not config.inherit:
        raise InputError(
            "finetune.network: found 'supernet', which keeps its searched weights and classifier; "
            "accepted with inherit true and a loss other than ldam-drw"
        )


def start_from_search(network: nn.Module, run: Run) -> bool:
    """Give `network` the searched weights that it starts from, if the run has a search.

    A supernet goes on as the search left it; a derived network inherits, unless told not to.

    Returns:
        Whether it now has searched weights.

    Raises:
        InputError: if the search's files are missing or of other parameters or data.
    """
    if "searches" not in run.folders:
        return False
    weights = load_weights(Places(run.folders).supernet, search_description(run))
    if run.finetune.network == "supernet":
        network.load_state_dict(weights)
        return True
    if run.finetune.network == "derived" and run.finetune.inherit:
        inherit(network, weights)
        return True
    return False

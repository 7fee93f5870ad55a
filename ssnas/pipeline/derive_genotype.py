"""Derive the genotype from the searched α."""

from ssnas.config.schema import Run
from ssnas.networks.genotype import derive
from ssnas.networks.supernet import architecture_of
from ssnas.pipeline.artifacts import Places, load_weights, search_description, write_text


def derive_genotype(run: Run) -> None:
    """Choose the operation of each edge, and the edges that stay."""
    places = Places.of(run)
    weights = load_weights(places.supernet, search_description(run))
    architecture = architecture_of(weights, run.search.relaxation)
    derive_by = run.derive
    genotype = derive(architecture, derive_by.rule, derive_by.threshold, derive_by.op)
    write_text(places.metrics("searches", "genotype.json"), genotype.to_json())

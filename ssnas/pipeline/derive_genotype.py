"""Derive the genotype from the searched α."""

from ssnas.config.schema import Run
from ssnas.networks.genotype import derive
from ssnas.networks.supernet import architecture_of
from ssnas.pipeline.artifacts import Places, load_weights, write_text
from ssnas.pipeline.lineage import made_from, record, verified


def derive_genotype(run: Run) -> None:
    """Choose the operation of each edge, and the edges that stay."""
    weights, about = load_weights(verified(run, "supernet")), made_from(run, "genotype")
    architecture = architecture_of(weights, run.search.relaxation)
    derive_by = run.derive
    genotype = derive(architecture, derive_by.rule, derive_by.threshold, derive_by.op)
    write_text(Places.of(run).metrics("searches", "genotype.json"), genotype.to_json())
    record(run, "genotype", about)

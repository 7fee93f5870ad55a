"""Derive the genotype from the searched α, and draw it."""

from ssnas.artifacts import Places, load_weights, search_description, write_text
from ssnas.config.schema import Run
from ssnas.networks.genotype import derive
from ssnas.networks.supernet import architecture_of
from ssnas.report.cells import draw_genotype
from stages.cli import main


def derive_genotype(run: Run) -> None:
    places = Places(run.folders)
    weights = load_weights(places.supernet, search_description(run))
    architecture = architecture_of(weights, run.search.relaxation)
    derive_by = run.derive
    genotype = derive(architecture, derive_by.rule, derive_by.threshold, derive_by.op)
    path = places.metrics("searches", "genotype.json")
    write_text(path, genotype.to_json())
    draw_genotype(genotype, path.with_suffix(".png"), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(("searches",), derive_genotype)

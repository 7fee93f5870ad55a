"""Derive the genotype from the searched α."""

from ssnas.pipeline.derive_genotype import derive_genotype
from stages.cli import main

if __name__ == "__main__":
    main(("searches",), derive_genotype)

"""Move a network to another data set, or a baseline without a row, train and test it there."""

from ssnas.pipeline.transfer import transfer
from stages.cli import main

if __name__ == "__main__":
    main(("transfers", "crossvalidations"), transfer)

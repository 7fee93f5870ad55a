"""Search the supernet on the long-tailed training images; their labels only monitor it."""

from ssnas.pipeline.search import run_search
from stages.cli import main

if __name__ == "__main__":
    main(("searches",), run_search)

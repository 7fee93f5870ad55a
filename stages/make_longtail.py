"""Read the source, hold out test and validation images, and make the rest long-tailed."""

from ssnas.pipeline.make_longtail import make_longtail
from stages.cli import main

if __name__ == "__main__":
    main(("datasets",), make_longtail)

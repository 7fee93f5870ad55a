"""What all stages share: the command line, messages, and errors that say what to do."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

from ssnas.config import Run, load_main, load_row
from ssnas.errors import InputError


def main(kind: str, stage: Callable[[Run], None]) -> None:
    """Run a stage for the main run, or for an entry of papers/rows.yaml; see `guarded`."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument(
        "--row", metavar="KEY", help=f"an entry of {kind} in papers/rows.yaml; default: params.yaml"
    )
    arguments = parser.parse_args()
    guarded(lambda: stage(load_row(kind, arguments.row) if arguments.row else load_main()))


def guarded(stage: Callable[[], None]) -> None:
    """A mistake of the user ends `stage` with one line and status 1, an interruption with 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        stage()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if os.environ.get("SSNAS_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)

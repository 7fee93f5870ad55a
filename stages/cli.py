"""The command line, messages and errors that all stages share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ssnas.config.load import load_main, load_row
from ssnas.config.schema import Run
from ssnas.runtime.allocator import keep_freed_memory
from ssnas.runtime.command import command


def main(kinds: tuple[str, ...], stage: Callable[[Run], None]) -> None:
    """Run a stage for the main run, or for an entry of papers/rows.yaml; see `guarded`.

    Args:
        kinds: the kinds of entries that have this stage; each has an option of its own.
    """
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    # An empty group breaks --help on Python 3.11.
    options = parser.add_mutually_exclusive_group() if kinds else parser
    for kind in kinds:
        options.add_argument(
            f"--{kind}",
            metavar="KEY",
            help=f"an entry of {kind} in papers/rows.yaml; default: params.yaml",
        )
    entries = {kind: key for kind, key in vars(parser.parse_args()).items() if key is not None}

    def run() -> Run:
        for kind, key in entries.items():
            return load_row(kind, key)
        return load_main()

    guarded(lambda: stage(run()))


def guarded(stage: Callable[[], None]) -> None:
    """Run `stage` as a command whose mistakes end with status 1."""
    with command(status=1):
        stage()

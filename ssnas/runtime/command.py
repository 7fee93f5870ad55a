"""What all commands share: messages on the error stream, and how a command ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ssnas.errors import InputError


@contextmanager
def command(status: int) -> Iterator[None]:
    """Run a command; end with one line and `status` for a user's mistake, 130 if interrupted.

    With SSNAS_DEBUG set, an error of the system shows where it came from.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and os.environ.get("SSNAS_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)

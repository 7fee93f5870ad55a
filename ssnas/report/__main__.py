"""Print the summary of a run: `python -m ssnas.report [metrics/main]`."""

import sys
from pathlib import Path

from ssnas.errors import InputError
from ssnas.report.summary import summary

if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "metrics/main"
    try:
        print(summary(Path(folder)))
    except InputError as error:
        sys.exit(f"error: {error}")

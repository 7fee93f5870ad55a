"""Bring the results block of README.md up to date with metrics/tables."""

import argparse
import sys
from pathlib import Path

from ssnas.report.papers.declared import TABLES, read_tables
from ssnas.report.papers.readme import replace_block, results
from ssnas.report.papers.records import Records
from stages.cli import guarded
from stages.tables import FOLDER

README = Path("README.md")


def readme(check: bool) -> None:
    records = Records.read()
    content = results(read_tables(TABLES, records), records.scales, FOLDER)
    text = README.read_text(encoding="utf-8")
    updated = replace_block(text, content)
    if not check:
        README.write_text(updated, encoding="utf-8")
    elif text != updated:
        sys.exit(f"{README}: the results are not up to date; run `python -m stages.readme`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if it is not up to date"
    )
    arguments = parser.parse_args()
    guarded(lambda: readme(arguments.check))

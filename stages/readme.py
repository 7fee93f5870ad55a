"""Bring the results block of docs/results.md up to date with papers/tables."""

import argparse
import sys
from pathlib import Path

from ssnas.report.papers.declared import TABLES, read_tables
from ssnas.report.papers.readme import replace_block, results
from ssnas.report.papers.records import Records
from stages.cli import guarded
from stages.tables import FOLDER

PAGE = Path("docs/results.md")


def readme(check: bool) -> None:
    records = Records.read()
    content = results(read_tables(TABLES, records), records.scales, FOLDER)
    text = PAGE.read_text(encoding="utf-8")
    updated = replace_block(text, content)
    if not check:
        PAGE.write_text(updated, encoding="utf-8")
    elif text != updated:
        sys.exit(f"{PAGE}: the results are not up to date; run `python -m stages.readme`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if it is not up to date"
    )
    arguments = parser.parse_args()
    guarded(lambda: readme(arguments.check))

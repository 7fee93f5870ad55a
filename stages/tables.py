"""The papers' tables, measured beside reported, one file a table and scale."""

from pathlib import Path

from ssnas.report.papers.declared import TABLES, read_tables
from ssnas.report.papers.records import Records
from ssnas.report.papers.tables import write_tables
from stages.cli import guarded

FOLDER = Path("papers/tables")


def tables() -> None:
    records = Records.read()
    print(write_tables(read_tables(TABLES, records), records, FOLDER))


if __name__ == "__main__":
    guarded(tables)

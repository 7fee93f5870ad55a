"""The papers' tables, measured beside reported, one file a table and scale."""

from pathlib import Path

from ssnas.report import Records, read_tables, write_tables
from ssnas.report.declared import TABLES
from stages.cli import guarded

FOLDER = Path("metrics/tables")


def tables() -> None:
    records = Records.read()
    print(write_tables(read_tables(TABLES, records), records, FOLDER))


if __name__ == "__main__":
    guarded(tables)

"""Write the report page of the main run."""

from pathlib import Path

from ssnas.config.schema import Run
from ssnas.report.page import write_html
from stages.cli import main


def report(run: Run) -> None:
    folder = Path("metrics", run.folders["rows"])
    page = folder / "report.html"
    write_html(folder, page)
    print(f"{page} is written; `python -m ssnas.report` prints the summary")


if __name__ == "__main__":
    main((), report)

"""Write the report page and the pictures of the main run's curves, and print its summary."""

from pathlib import Path

from ssnas.config import Run
from ssnas.report import summary, write_html
from stages.common import main


def report(run: Run) -> None:
    folder = Path("metrics", run.folders["rows"])
    write_html(folder, folder / "report.html")
    print(summary(folder))


if __name__ == "__main__":
    main("rows", report)

"""Digest what the stages depend on: the sources that each of them imports, the images of the run.

DVC hashes whole files and folders. A stage that depends on these digests is not run again for a
comment, a docstring, a module that it does not import, or the images of another data set.
"""

import argparse
import hashlib
from pathlib import Path

from ssnas.config.load import load_main
from ssnas.data.listing import visible_files
from ssnas.pipeline.artifacts import RAW, write_json
from ssnas.runtime.source import closure
from stages.cli import guarded


def write_code(folder: Path, stages: list[str]) -> None:
    """Write `folder`/code/<stage>.json, {path: digest} of its sources, for each stage."""
    for stage in stages:
        sources = closure(f"stages.{stage.replace('-', '_')}")
        write_json(folder / "code" / f"{stage}.json", sources)


def write_raw(folder: Path) -> None:
    """Write `folder`/raw/dataset.json and transfer.json, {path: digest} of the images there."""
    run = load_main()
    for name, dataset in {"dataset": run.data.dataset, "transfer": run.transfer.dataset}.items():
        paths = read_by(dataset) if dataset else []
        listing = {path.as_posix(): digest(path) for path in paths}
        write_json(folder / "raw" / f"{name}.json", listing)


def read_by(dataset: str) -> list[Path]:
    """List what a data set reads: its own path, or the entries of data/raw of its name."""
    if Path(dataset).exists():
        return [Path(dataset)]
    return sorted(RAW.glob(f"{dataset.removeprefix('medmnist:')}*"))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's visible files."""
    content = hashlib.sha256()
    if path.is_dir():
        for file in visible_files(path)[0]:
            content.update(f"{file.relative_to(path).as_posix()} {digest(file)}\n".encode())
        return content.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def write_inputs(folder: Path, stages: list[str], raw: bool) -> None:
    write_code(folder, stages)
    if raw:
        write_raw(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the digests go")
    parser.add_argument("stages", nargs="+", metavar="stage", help="such as make-longtail")
    parser.add_argument("--raw", action="store_true", help="also the main run's images")
    arguments = parser.parse_args()
    guarded(lambda: write_inputs(arguments.folder, arguments.stages, arguments.raw))

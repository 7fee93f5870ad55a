"""Digest what the stages depend on: the sources that each of them imports, the images of the run.

DVC hashes whole files and folders. A stage that depends on these digests is not run again for a
comment, a docstring, a module that it does not import, or the images of another data set.
"""

import argparse
from pathlib import Path

from ssnas.config.load import load_main
from ssnas.data.raw import content_digest, file_of, raw_paths
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
    read: dict[str, list[str | None]] = {
        "dataset": [run.data.dataset],
        "transfer": [run.transfer.dataset],
    }
    if run.data.unlabelled is not None:
        read["dataset"].append(file_of(run.data.unlabelled))
    for name, datasets in read.items():
        paths = [path for dataset in datasets if dataset for path in raw_paths(dataset, RAW)]
        listing = {path.as_posix(): content_digest(path) for path in paths}
        write_json(folder / "raw" / f"{name}.json", listing)


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

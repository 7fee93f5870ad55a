"""The command `ssnas`: from a folder of images to a model, and from a model to predictions."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import ssnas
from ssnas.errors import InputError
from ssnas.runtime.command import command

PROGRAM = "ssnas"
FIGURES = Path("metrics", "evaluate.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; end with one line and status 2 for a user's mistake, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    with command(status=2):
        try:
            options.run(options)
        except BrokenPipeError:
            # The reader, such as `head`, has what it wants. Nothing is left to flush to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except ModuleNotFoundError as error:
            # `Model.export_onnx` names its own extra.
            raise InputError(
                f"{error.name} is not installed; pip install '{PROGRAM}[train]'"
            ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {ssnas.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="search, train and test a network for images")
    fit.set_defaults(run=_fit)
    fit.add_argument("data", metavar="DATA", help="a folder, an .npz, or a data set by its name")
    fit.add_argument("--out", type=Path, required=True, help="the folder of everything it writes")
    fit.add_argument("--size", type=int, help="the side that images are resized to, in pixels")
    fit.add_argument(
        "--minutes", type=float, help="for all of it; without, what suits the number of images"
    )
    fit.add_argument(
        "--search",
        help="none, for a fixed genotype (default), or an objective such as barlow-twins",
    )
    fit.add_argument("--scale", help="a preset of widths and epochs: small (default), paper")
    fit.add_argument("--loss", help="such as ce+la (default) or focal+la")
    fit.add_argument("--seed", type=int, help="default 0")
    fit.add_argument("--device", help="auto (default), cpu, cuda:0, ...")
    fit.add_argument("--prior", help=f"of the decision (default balanced): {_PRIORS}")
    fit.add_argument("--params", type=Path, help="a file like params.yaml, instead of the defaults")
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other parameter, such as search.epochs=5; may be given again",
    )

    predict = commands.add_parser("predict", help="classify images")
    predict.set_defaults(run=_predict)
    _add_model(predict)
    predict.add_argument("paths", nargs="+", metavar="PATH", help="images, or folders of them")
    predict.add_argument("--csv", type=Path, help="write the table there instead of printing it")
    predict.add_argument("--batch", type=int, default=256, help="images at a time (256)")
    predict.add_argument("--prior", help=f"instead of the model's own: {_PRIORS}")

    export = commands.add_parser("export", help="write a model as an ONNX graph")
    export.set_defaults(run=_export)
    _add_model(export)
    export.add_argument("--onnx", type=Path, required=True, help="the file to write")
    export.add_argument("--prior", help=f"instead of the model's own: {_PRIORS}")

    info = commands.add_parser("info", help="describe a model")
    info.set_defaults(run=_info)
    _add_model(info)

    report = commands.add_parser("report", help="print the summary of a run, and write its page")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="RUN", help="the --out folder of `fit`")
    return parser


_PRIORS = "balanced, natural, published, f1 (several labels), or cat=0.9,dog=0.1"


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model.ssnas")


def _prior(text: str | None) -> Any:
    """Read a prior: a name, or `class=frequency,...`.

    Raises:
        InputError: for a frequency that is no number.

    Example:
        >>> _prior("cat=0.9,dog=0.1"), _prior("natural")
        ({'cat': 0.9, 'dog': 0.1}, 'natural')
    """
    if text is None or "=" not in text:
        return text
    shares = {}
    for part in text.split(","):
        name, _, share = part.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise InputError(f"--prior: found {part!r}; accepted: class=frequency,...") from None
    return shares


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Read `section.key=value` and `key=value`, the values as in YAML.

    Raises:
        InputError: for an assignment of another form.

    Example:
        >>> _settings(["search.epochs=5", "search.channels=4", "size=32"])
        {'search': {'epochs': 5, 'channels': 4}, 'size': 32}
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *section, key = path.split(".")
        if not equals or len(section) > 1 or not key:
            raise InputError(
                f"--set: found {assignment!r}; accepted: KEY=VALUE, such as search.epochs=5"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set: {path}: found {text!r}, which is no YAML") from None
        (settings.setdefault(section[0], {}) if section else settings)[key] = value
    return settings


def _fit(options: argparse.Namespace) -> None:
    from ssnas.pipeline.fit import fit
    from ssnas.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    chosen = {
        "size": options.size,
        "search": options.search,
        "scale": options.scale,
        "loss": options.loss,
        "seed": options.seed,
        "device": options.device,
        "decide": _prior(options.prior),
    }
    settings = _settings(options.set)
    if options.search and "search" in settings:
        raise InputError(
            f"--search: found {options.search!r} beside --set search.…; accepted is one of them"
        )
    settings |= {k: v for k, v in chosen.items() if v is not None}
    fit(options.data, out=options.out, params=options.params, minutes=options.minutes, **settings)
    if (options.out / FIGURES).exists():
        _write_report(options.out)
    print(f"{'model':<16}{options.out / 'model.ssnas'}")


def _predict(options: argparse.Namespace) -> None:
    model = ssnas.load(options.model)
    table = model.predict(list(_images(options.paths)), _prior(options.prior), options.batch)
    if options.csv is None:
        table.to_csv(sys.stdout, float_format="%.6g")
        return
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.csv, float_format="%.6g")
    print(f"{len(table)} predictions: {options.csv}")


def _images(paths: Sequence[str]) -> Iterator[str]:
    """Yield image files, and those in folders by name.

    Raises:
        InputError: for a folder without images.
    """
    from ssnas.data.listing import image_files

    for path in paths:
        if not Path(path).is_dir():
            yield path
            continue
        files = image_files(Path(path))
        if not files:
            raise InputError(f"{path}: found no image in this folder")
        yield from map(str, files)


def _export(options: argparse.Namespace) -> None:
    ssnas.load(options.model).export_onnx(options.onnx, _prior(options.prior))
    print(f"{options.onnx} is written: images as uint8 (N, H, W, C) in, probabilities out")


def _info(options: argparse.Namespace) -> None:
    print(ssnas.load(options.model).info())


def _report(options: argparse.Namespace) -> None:
    if not (options.folder / FIGURES).exists():
        raise InputError(
            f"{options.folder}: found no test figures; accepted: the --out folder of `ssnas fit`"
        )
    _write_report(options.folder)


def _write_report(run: Path) -> None:
    from ssnas.report.card import write_card
    from ssnas.report.summary import summary
    from ssnas.report.write import write_report

    numbers, card = run / "metrics", run / "MODEL_CARD.md"
    write_report(numbers, run / "report")
    write_card(numbers, card)
    print(summary(numbers, run / "report", str(run)))
    print(f"{'model card':<16}{card}")


if __name__ == "__main__":
    main()

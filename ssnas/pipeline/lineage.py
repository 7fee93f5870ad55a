"""What the artifacts of a run were made from: recorded by the stage, compared by every reader.

DVC runs the stages in their order, each when something that it depends on has changed. A stage that
somebody runs by hand has no such guard. So each artifact has a record beside the figures,
lineage/<artifact>.json, with the checksum of its file and of all that it was made from. A reader
compares them with the file and the parameters of now, and does the same for the artifacts that it
was made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ssnas.config.schema import Run
from ssnas.errors import InputError
from ssnas.pipeline.artifacts import RAW, Places, write_json
from ssnas.runtime.files import sha256_of
from ssnas.runtime.identity import differences
from ssnas.runtime.source import closure


class Artifact(NamedTuple):
    """An artifact that stages read.

    Attributes:
        stage: the module that makes it, in `ssnas.pipeline`.
        kind: of the run's entry that it belongs to, see `ssnas.config.schema.Run`.
        path: its place.
        parameters: what it depends on of a run, JSON-able.
        inputs: the artifacts that it is made from.
    """

    stage: str
    kind: str
    path: Callable[[Places], Path]
    parameters: Callable[[Run], dict[str, Any]]
    inputs: tuple[str, ...] = ()


def _sections(kind: str, *names: str) -> Callable[[Run], dict[str, Any]]:
    def parameters(run: Run) -> dict[str, Any]:
        sections = {name: dataclasses.asdict(getattr(run, name)) for name in names}
        return {"seed": run.seeds[kind], **sections}

    return parameters


ARTIFACTS = {
    "splits": Artifact(
        "make_longtail", "datasets", lambda places: places.splits, _sections("datasets", "data")
    ),
    "supernet": Artifact(
        "search",
        "searches",
        lambda places: places.supernet,
        _sections("searches", "search", "views"),
        ("splits",),
    ),
    "genotype": Artifact(
        "derive_genotype",
        "searches",
        lambda places: places.metrics("searches", "genotype.json"),
        _sections("searches", "derive"),
        ("supernet",),
    ),
    "network": Artifact(
        "finetune",
        "rows",
        lambda places: places.network,
        _sections("rows", "finetune"),
        ("splits", "supernet", "genotype"),
    ),
    "figures": Artifact(
        "evaluate",
        "rows",
        lambda places: places.metrics("rows", "evaluate.json"),
        lambda run: {"decide": run.decide},
        ("splits", "network"),
    ),
}


def made_from(run: Run, name: str) -> dict[str, Any]:
    """Describe what an artifact of the run depends on as things stand now.

    Returns:
        `parameters`, `inputs` (the checksum of each artifact that it is made from), `code` (the
        digest of each source of its stage), and for the splits `images` (a digest of the files
        that they are read from, None where there are none).

    Raises:
        InputError: if an artifact that it is made from is missing.
    """
    artifact = ARTIFACTS[name]
    about: dict[str, Any] = {
        "parameters": json.loads(json.dumps(artifact.parameters(run))),
        "inputs": {other: _checksum(run, other) for other in _inputs(run, artifact)},
        "code": closure(f"ssnas.pipeline.{artifact.stage}"),
    }
    if not artifact.inputs:
        # Comparing changes no figure: by name, so that no stage depends on how folders are listed.
        raw = importlib.import_module("ssnas.data.raw")
        about["images"] = raw.images_digest(run.data.dataset, RAW)
        if run.data.unlabelled is not None:
            about["unlabelled"] = raw.images_digest(raw.file_of(run.data.unlabelled), RAW)
    return about


def record(run: Run, name: str, about: dict[str, Any]) -> None:
    """Write the record of an artifact that was just made.

    Args:
        about: from `made_from`, or `ssnas.pipeline.work.identity`, as it was before the work began.
    """
    artifact, places = ARTIFACTS[name], Places.of(run)
    path = artifact.path(places)
    code = {"code": _digest_of(about["code"])}
    document = {"file": path.name, "sha256": sha256_of(path), **about, **code}
    write_json(_record_path(places, name), document)


def verified(run: Run, name: str) -> Path:
    """Return the place of an artifact that is whole and was made from what is there now.

    Raises:
        InputError: naming the file, what differs, and the command that repairs it.
    """
    artifact, places = ARTIFACTS[name], Places.of(run)
    for other in _inputs(run, artifact):
        verified(run, other)
    path, where = artifact.path(places), _record_path(places, name)
    checksum = _checksum(run, name)
    try:
        recorded = json.loads(where.read_text(encoding="utf-8"))
        written = recorded["sha256"]
    except FileNotFoundError:
        raise InputError(f"{path}: has no record {where}; `dvc repro` makes both") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{where}: damaged; delete it and run `dvc repro`") from None
    if written != checksum:
        raise InputError(
            f"{path}: damaged, or not the file that {where} records; run `dvc checkout` to bring "
            "that one back, or delete it and run `dvc repro`"
        )
    different = _differing(recorded, made_from(run, name))
    if different:
        raise InputError(
            f"{path}: made from something else than is there now ({'; '.join(different)}); run "
            "`dvc repro`, or `dvc checkout` to bring back the matching file"
        )
    return path


def up_to_date(run: Run, name: str) -> bool:
    """Tell whether an artifact is there, whole, and made from what is there now."""
    try:
        verified(run, name)
    except InputError:
        return False
    return True


def _differing(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    now = {**now, "code": _digest_of(now["code"])}
    if now.get("images") is None:
        # A clone may have the artifacts without the images that they are from.
        now.pop("images", None)
    lines = differences({key: recorded.get(key) for key in now}, now)
    return [line.removeprefix("parameters.") for line in lines]


def _inputs(run: Run, artifact: Artifact) -> list[str]:
    """Name the artifacts that it is made from; a run without a search has fewer."""
    return [name for name in artifact.inputs if ARTIFACTS[name].kind in run.folders]


def _record_path(places: Places, name: str) -> Path:
    return places.metrics(ARTIFACTS[name].kind, f"lineage/{name}.json")


def _checksum(run: Run, name: str) -> str:
    path = ARTIFACTS[name].path(Places.of(run))
    try:
        return sha256_of(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; `dvc repro` makes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _digest_of(code: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()

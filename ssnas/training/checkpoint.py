"""Checkpoints: written atomically, and resumed only by the very work that wrote them."""

from __future__ import annotations

import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ssnas.errors import InputError
from ssnas.runtime.identity import differences

log = logging.getLogger(__name__)

FILE = "last.pt"


class Checkpoint:
    """The newest state of one piece of work, in a folder of its own.

    Use as a context manager: it locks the folder, so that two processes never write it, and
    leaves the checkpoint there if the work fails. `finish` removes it.

    Args:
        folder: outside the outputs that DVC manages, so that DVC does not delete it.
        identity: what the work depends on, JSON-able: `parameters`, `data`, and as `code` the
            digests of the sources (see `ssnas.runtime.source.closure`). A checkpoint of another
            identity is set aside, with a message that names what differs.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with Checkpoint(Path(folder), {"parameters": {"epochs": 2}}) as checkpoint:
        ...         checkpoint.save({"epoch": 1})
        ...         checkpoint.load()
        {'epoch': 1}
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self._lock: Any = None

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def __enter__(self) -> Checkpoint:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(
                f"{self.folder}: no place for checkpoints ({error.strerror}); make room, or the "
                "folder writable"
            ) from error
        if not _locked(self._lock):
            self._lock.close()
            raise InputError(
                f"{self.folder}: another process is at this work; wait for it, or end it"
            )
        for leftover in self.folder.glob("*.partial"):
            leftover.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step: a crash leaves the old one or the new one.

        Raises:
            InputError: if it cannot be written, for instance on a full disk.
        """
        partial = self.folder / f"{FILE}.partial"
        try:
            with partial.open("wb") as file:
                torch.save({"identity": self.identity, "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            kept = "the one before is kept" if self.path.exists() else "there is none yet"
            raise InputError(
                f"{self.path}: the checkpoint cannot be written ({error}); {kept}; free some "
                "space and run the same command again to go on"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """Return the state to go on from, or None to start anew."""
        if not self.path.exists():
            return None
        try:
            _check_content(self.path)
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, state = content["identity"], content["state"]
        except Exception:
            # A damaged file fails in as many ways as it can be damaged.
            self._set_aside("cannot be read; it is truncated or damaged")
            return None
        different = differences(identity, self.identity)
        if different:
            self._set_aside(f"belongs to other work ({'; '.join(different)})")
            return None
        return state

    def finish(self) -> None:
        """Drop the checkpoint, once the results of the work are written."""
        self.path.unlink(missing_ok=True)

    def _set_aside(self, reason: str) -> None:
        aside = self.folder / f"set-aside-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns()}.pt"
        self.path.replace(aside)
        log.warning("checkpoint %s %s: set aside as %s; starting anew", self.path, reason, aside)


def _locked(file: IO[str]) -> bool:
    """Lock an open file for this process; False if another one has it.

    Windows has no such locks; there, two processes at the same work disturb each other.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check_content(path: Path) -> None:
    """Compare the checksums in a file of `torch.save`, a zip, with its content; PyTorch does not.

    Raises:
        BadZipFile: if one differs.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)

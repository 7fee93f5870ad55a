"""Files that appear whole or not at all, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ssnas.errors import InputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`; if the writing fails, nothing changes.

    Raises:
        InputError: naming the file, if the system refuses to write it: the disk is full or
            read-only, or the folder is somebody else's.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "new", "text")
        ...     with written_whole(path) as partial:
        ...         _ = partial.write_text("whole")
        ...     path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        named = str(error.filename or "")
        reason = (
            f"{error.strerror or error}{f': {named}' if named not in ('', str(partial)) else ''}"
        )
        raise InputError(
            f"{path}: cannot be written ({reason}); make room or the folder writable, then run "
            "the same command again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content; a file that has not changed is read once.

    Raises:
        OSError: if it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "empty")
        ...     path.touch()
        ...     sha256_of(path)[:12]
        'e3b0c44298fc'
    """
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# A stage compares the images with several records: a folder of many files is read once, too.
@lru_cache(maxsize=2**17)
def _sha256(path: Path, inode: int, size: int, modified: int, changed: int) -> str:
    content = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            content.update(block)
    return content.hexdigest()

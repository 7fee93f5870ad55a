"""The memory that this process frees, kept for its next step."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that is freed, for this process's next allocations.

    glibc returns large blocks to the system as soon as they are freed, and the system clears every
    page before it hands it out again. A training step on a CPU frees all that it computed, so each
    step would wait for the same pages once more: longer than some of its kernels run. Kept memory
    stays with the process until it ends, as much as it ever used at a time.

    This changes the allocator of the whole process, so only an entry point calls it, before its
    first large tensor. Importing the package never does.

    Returns:
        True where the C library is glibc and accepted the setting; elsewhere nothing changes.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # there is no C library to ask, as on Windows
        return False
    if not hasattr(libc, "gnu_get_libc_version"):  # others number the parameters differently
        return False
    settings = (
        (_MMAP_MAX, 0),  # no block gets a mapping of its own, which would go when it is freed
        (_TRIM_THRESHOLD, _LARGEST_INT),  # the heap does not shrink
        (_TOP_PAD, 64 << 20),  # it grows in large steps
    )
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)

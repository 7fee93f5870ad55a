"""The exception for mistakes that the user can mend."""

from __future__ import annotations

SHOWN = 80
"""The most characters of a value that a message shows."""


class InputError(ValueError):
    """A wrong key, value, file or image.

    The message is one line: where the mistake is, the value, and what is accepted. Stages print
    it and exit with status 1, without a traceback.
    """

    def __init__(self, message: str) -> None:
        # Names and values are the user's, and may hold what no terminal or file takes.
        line = " ".join(message.splitlines())
        super().__init__(line.encode("utf-8", "backslashreplace").decode("utf-8"))


def shown(value: object) -> str:
    """Write a value for a message, cut off if it is long.

    Example:
        >>> shown("cat"), len(shown("cat" * 100))
        ("'cat'", 81)
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; deep lists
        return f"a value that cannot be shown ({type(error).__name__})"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

"""The exception for mistakes that the user can mend."""


class InputError(ValueError):
    """A wrong key, value, file or image.

    The message is one line: where the mistake is, the value, and what is accepted. Stages print
    it and exit with status 1, without a traceback.
    """

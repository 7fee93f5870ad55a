"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """A wrong key, value, file or image.

    The message names what was found, where, and what is accepted. Stages print it as one
    line and exit with status 1, without a traceback.
    """

"""The one exception for input that a user can put right."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What was given cannot be used; the message says what was given, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """

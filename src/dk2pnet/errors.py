"""The exceptions for input that a user can put right."""

__all__ = ["InputError", "TooSmall"]


class InputError(ValueError):
    """What was given cannot be used; the message says what was given, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """


class TooSmall(InputError):
    """A budget that no network can be made for."""

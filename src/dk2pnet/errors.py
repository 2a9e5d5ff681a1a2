"""The exceptions for input that a user can put right."""

__all__ = ["InputError", "Refused", "TooSmall", "first_line"]


class InputError(ValueError):
    """What was given cannot be used; the message says what was given, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """


class Refused(InputError):
    """What was asked for turned out, on the way, not to be possible: the same command would not do better."""


class TooSmall(Refused):
    """A budget that no network can be made for."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")

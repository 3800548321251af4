"""The error a person is meant to read: one line, no traceback, no secret."""

from lolcats_common.secrets import redacted


class UserError(ValueError):
    """Something the user gave is missing, damaged or breaks a constraint.

    The message names the thing, the constraint and the value given, and says what to do where that is not obvious.
    Stages and the command line print it as one line and exit with code 1; any other exception is a defect of ours and
    keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # Values from files may hold line breaks and control characters; the message stays one readable line.
        super().__init__(printable(redacted(message)))


def printable(text: str) -> str:
    """Text as one line: line breaks and control characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class DivergedError(UserError):
    """A loss is NaN or infinite: the weights that gave it are of no use."""


class Unavailable(UserError):
    """Something outside (a tracking server, a DVC remote) does not answer: the same call may succeed later."""


class DiskRefused(UserError, OSError):
    """The disk takes no more: it is full, a quota or a limit is reached, or it is read-only."""


class ParamsError(UserError):
    """A parameter is unknown, has the wrong type or breaks its constraint."""


def require(holds: bool, constraint: str, value: object) -> None:
    """Raise a `ParamsError` that names the constraint and the value where it does not hold."""
    if not holds:
        raise ParamsError(f"{constraint}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as an error shows it: on one line that a person can read, whatever was given."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or nested too deeply
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else text[:200] + "…"

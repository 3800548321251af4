"""How the project's programs end: exit code 0, 1 after one line for the user, 143 or 130 when they are ended."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

from lolcats_common.errors import UserError
from lolcats_common.files import REFUSALS

_OWNER = "the user who runs this needs access there"
_OPEN_FILES = "raise the limit (`ulimit -n`) or run less at a time"
DENIED = {
    **{errno.EACCES: _OWNER, errno.EPERM: _OWNER, errno.EMFILE: _OPEN_FILES, errno.ENFILE: _OPEN_FILES},
    **dict.fromkeys(REFUSALS, "free space there and run the same command again"),
    errno.ENOMEM: "give it more memory (`ulimit -v`) or less to do at a time",
}
# How libraries say it that keep no number: safetensors and tokenizers, then torch, the interpreter and the loader.
_NUMBER = re.compile(r"\(os error (\d+)\)")
_MEMORY = re.compile(r"can't allocate memory|can't start new thread|failed to map segment|Cannot allocate memory")


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that nothing catches it by accident."""


def raise_terminated(signum: int, frame: object) -> None:
    """Signal handler that turns SIGTERM into an exception, so that open runs and files are closed."""
    raise Terminated


def print_error(message: str) -> None:
    """Print a user's error as the command line does."""
    print(f"Error: {message}", file=sys.stderr, flush=True)


def denial(error: BaseException | None) -> str | None:
    """What this machine denies to the user who runs the program, in one line; None where that is not what happened."""
    while error is not None:
        number = _number(error)
        if number in DENIED:
            # What a program prints has no name.
            place = getattr(error, "filename", None) or ("the output" if number in REFUSALS else None)
            return str(UserError(f"{f'{place}: ' if place else ''}{os.strerror(number)}; {DENIED[number]}"))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _number(error: BaseException) -> int | None:
    """The system's number of an error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, MemoryError) or _MEMORY.search(str(error)):
        return errno.ENOMEM
    match = _NUMBER.search(str(error))
    return int(match[1]) if match else None


def run_and_report(work: Callable[[], object], name: str, on_error: Callable[[str], object] = print_error) -> int:
    """Do `work` and return the program's exit code; any exception but those below is a defect and keeps its traceback.

    What the machine denies (`DENIED`), wherever it does, is no defect: it is said as a user's error is.

    Args:
        name: of the program, said where it was ended by a signal.
        on_error: gets the message of a `UserError`, which is one line.
    """
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        on_error(" ".join(str(error).split()))
        return 1
    except Terminated:
        print(f"{name}: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        denied = denial(error)
        if denied is None:
            raise
        on_error(denied)
        return 1
    return 0

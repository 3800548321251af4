"""How the project's programs end: exit code 0, 1 after one line for the user, 143 or 130 when they are ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from lolcats_common.errors import UserError
from lolcats_common.files import REFUSALS


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that nothing catches it by accident."""


def raise_terminated(signum: int, frame: object) -> None:
    """Signal handler that turns SIGTERM into an exception, so that open runs and files are closed."""
    raise Terminated


def print_error(message: str) -> None:
    """Print a user's error as the command line does."""
    print(f"Error: {message}", file=sys.stderr, flush=True)


def run_and_report(work: Callable[[], object], name: str, on_error: Callable[[str], object] = print_error) -> int:
    """Do `work` and return the program's exit code; any exception but those below is a defect and keeps its traceback.

    A disk that takes no more is the user's, whether it holds a file or what the program prints.

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
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        place = error.filename or "the output"
        on_error(f"{place}: {os.strerror(error.errno)}; free space there and run the same command again")
        return 1
    except Terminated:
        print(f"{name}: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0

"""Starting, ending and watching processes in tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

LAST_RESORT = 600.0  # seconds


def start(root: Path, log: Path, *arguments: str, group: bool = False) -> subprocess.Popen[bytes]:
    """This Python with `arguments` in `root`, its output in `log`; with `group`, in a session of its own."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=group,
        )


def wait_for(
    condition: Callable[[], Any], what: str, unless: Callable[[], str] = lambda: "", pause: float = 0.05
) -> None:
    """Poll until `condition` holds; fail at once when `unless` says why it cannot come true any more.

    How long that takes is the machine's affair and never a test's: `LAST_RESORT` only lets a test end.
    """
    deadline = time.monotonic() + LAST_RESORT
    while not condition():
        if why := unless():
            assert condition(), f"{what} cannot come any more: {why}"
            return
        assert time.monotonic() < deadline, f"{what} did not come within {LAST_RESORT:.0f} s"
        time.sleep(pause)


def wait_for_text(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Poll until `text` stands in the file that `process` writes."""

    def said() -> str:
        return log.read_text(errors="replace")

    def ended() -> str:
        return "" if process.poll() is None else f"the process ended with {process.returncode}: {said()[-4000:]}"

    wait_for(lambda: text in said(), f"{text!r} in {log}", ended)


def processes_in(root: Path) -> Iterator[str]:
    """Command lines of the running processes whose working directory lies in `root`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            directory = Path(process.cwd())
            if directory.is_relative_to(root) and process.status() != psutil.STATUS_ZOMBIE:
                yield " ".join(process.cmdline())

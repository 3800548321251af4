"""Process groups that end as one, processes that end when the one they work for is gone, and one process a stage."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lolcats_common.errors import UserError
from lolcats_common.files import disk_refusals

logger = logging.getLogger(__name__)
GRACE_SECONDS = 15.0
LOCK_SECONDS = 10.0
SUPERVISOR_VARIABLE = "LOLCATS_SUPERVISOR_PID"


def end_group(process: subprocess.Popen[bytes], grace: float = GRACE_SECONDS) -> None:
    """End every process of a group: SIGTERM, and after `grace` seconds SIGKILL. A second Ctrl-C waits."""
    with _signals_deferred():
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while (process.poll() is None or _alive(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits to be reaped does not."""
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    try:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_when_gone(processes: Iterable[psutil.Process]) -> None:
    """Send this process SIGTERM once any of `processes` is gone."""
    watched = list(processes)
    if not watched:
        return

    def running() -> bool:
        try:
            return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched)
        except psutil.Error:
            return False

    def watch() -> None:
        while running():
            time.sleep(1.0)
        logger.warning("the process that started this one is gone; ending")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="exit_when_gone", daemon=True).start()


def process_of(variable: str) -> list[psutil.Process]:
    """The process whose id an environment variable holds, as a list of one or none."""
    with contextlib.suppress(psutil.Error, ValueError):
        return [psutil.Process(int(os.environ.get(variable, "")))]
    return []


def supervise(command: Sequence[str]) -> int:
    """Run `command` in a session of its own and return its exit code.

    A signal to this process' group (Ctrl-C, `timeout`, a service manager) would also hit the flow's temporary server,
    without which the flow cannot end its run in order. So the flow alone gets SIGTERM, and what is left of its group
    when it ended is ended too.
    """
    environment = {**os.environ, SUPERVISOR_VARIABLE: str(os.getpid())}
    received: list[int] = []
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        code = process.wait()
    finally:
        end_group(process)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def exit_with_supervisor() -> None:
    """In a process that `supervise` started: end when the supervisor is gone."""
    exit_when_gone(process_of(SUPERVISOR_VARIABLE))


@contextlib.contextmanager
def alone(name: str, root: Path) -> Iterator[None]:
    """Hold a stage, after a moment for a process of it that is ending; two would write into one another's outputs.

    Raises:
        UserError: one still runs.
    """
    lock = root / ".scratch" / f"{name}.lock"
    with disk_refusals(lock):
        lock.parent.mkdir(exist_ok=True)
        try:
            held = FileLock(lock).acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(f"this stage already runs in {root}; wait for its end, or end it") from None
    with held:
        yield

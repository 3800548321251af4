"""Progress where a person waits: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What `progress` yields."""

    def update(self, n: int = 1, **shown: float) -> None:
        """Advance by `n`; `shown` are values to print beside the bar, such as ``loss=0.12``."""


def _format(shown: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


class _Lines:
    def __init__(self, total: int, label: str, initial: int) -> None:
        self.total, self.label, self.done = total, label, initial
        self.started, self.initial, self.printed = time.monotonic(), initial, time.monotonic()

    def update(self, n: int = 1, **shown: float) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.printed = now
        rate = (self.done - self.initial) / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        logger.info("%s %d/%d  %s  %.0f s left", self.label, self.done, self.total, _format(shown), left)


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, n: int = 1, **shown: float) -> None:
        self.bar.update(self.task, advance=n, shown=_format(shown))


@contextlib.contextmanager
def progress(total: int, label: str, initial: int = 0) -> Iterator[Progress]:
    """Show how far `label` is, counting from `initial` to `total`."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":  # of several processes the first has the bar
        yield _Lines(total, label, initial)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(label, total=total, completed=initial, shown=""))

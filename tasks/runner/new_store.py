"""A local MLflow store before MLflow opens it: made by one process, whole or not at all, and readable."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from pathlib import Path

from filelock import FileLock


def ensure(database: Path) -> None:
    """Make a database file with MLflow's tables unless there is one, which must be readable.

    MLflow makes them in some sixty steps. A second process among these steps, or a kill, leaves tables behind that no
    later call can use; so they are made under another name, by one process at a time.

    Raises:
        sqlite3.Error: what is there cannot be read. MLflow would try for two minutes.
    """
    if _is_missing(database):
        _make(database)
    with contextlib.closing(sqlite3.connect(database)) as store:
        store.execute("PRAGMA schema_version")


def _make(database: Path) -> None:
    from mlflow import MlflowClient

    with FileLock(f"{database}.lock"):
        if not _is_missing(database):
            return
        for leftover in database.parent.glob(f"{database.name}.new-*"):
            leftover.unlink()
        # A name of its own, because MLflow keeps connections by the address.
        partial = Path(f"{database}.new-{uuid.uuid4().hex}")
        MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
        partial.replace(database)


def _is_missing(database: Path) -> bool:
    return not database.is_file() or database.stat().st_size == 0

"""A local MLflow store whose project was moved or copied.

MLflow writes absolute paths into its database. The artifacts of a database file lie beside it, in mlartifacts/; where
its paths lead elsewhere, the project is not where it was when they were written.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

logger = logging.getLogger(__name__)
ARTIFACTS = "mlartifacts"
# Every column that holds the place of a file.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def artifacts_of(database: Path) -> Path:
    """Where the artifacts of a database file lie."""
    return database.resolve().parent / ARTIFACTS


def follow(database: Path, experiment: str) -> None:
    """Let the paths in a database file lead to the artifacts beside it.

    A copy has artifacts of its own; without any, a path that still leads somewhere is left alone.

    Raises:
        sqlite3.Error: the database is locked, or lacks MLflow's tables.
    """
    here = artifacts_of(database)
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as store:
        found = store.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)).fetchone()
        old = str(found[0]) if found else ""
        # Another name is a place that someone chose.
        if not (old.startswith("file:///") and old.endswith(f"/{ARTIFACTS}")) or old == here.as_uri():
            return
        if Path(unquote(urlparse(old).path)).exists() and not here.is_dir():
            return
        logger.warning("MLflow's store was made beside %s; its paths lead to %s from now on", old, here)
        with store:
            for table, column in PLACES:
                store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} GLOB ?",
                    (here.as_uri(), len(old) + 1, old, f"{old}/*"),
                )

"""The newest runs and registered versions, as `lolcats status` lists them.

MLflow's client takes two seconds of CPU to import, so a local store's database is read directly; a server is asked
through the client. `tests/tasks/runner/test_store.py` holds one against the other.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lolcats_common.errors import Unavailable
from tasks.runner.mlflow_run import EXPERIMENT, connect, experiment_id, tracking_uri

NEWEST = 10
RUNS = """
SELECT run_uuid, runs.name, status, start_time FROM runs JOIN experiments USING (experiment_id)
WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT ?
"""
ALIASES = "SELECT name, CAST(version AS TEXT), alias FROM registered_model_aliases ORDER BY alias"
VERSIONS = """
SELECT name, CAST(version AS TEXT), creation_time FROM model_versions
WHERE current_stage != 'Deleted_Internal' ORDER BY name, version DESC
"""


class RunRow(NamedTuple):
    """One MLflow run. `started`: milliseconds since 1970."""

    id: str
    name: str
    status: str
    started: int


class VersionRow(NamedTuple):
    """One registered version. `created`: milliseconds since 1970."""

    model: str
    number: str
    created: int


@dataclass(frozen=True)
class Overview:
    """The newest runs, the last one first; all versions by model, the last one first; and aliases by version."""

    runs: list[RunRow]
    versions: list[VersionRow]
    aliases: list[tuple[str, str, str]]

    def newest_versions(self) -> list[tuple[VersionRow, str]]:
        """The newest versions of each model, each with its aliases."""
        shown: dict[str, list[tuple[VersionRow, str]]] = {}
        for version in self.versions:
            named = [alias for *of, alias in self.aliases if of == [version.model, version.number]]
            shown.setdefault(version.model, []).append((version, ", ".join(named)))
        return [row for rows in shown.values() for row in rows[:NEWEST]]


def read_overview(root: Path) -> Overview:
    """What the project's store holds; nothing where no store was made yet.

    Raises:
        Unavailable: the store cannot be read.
        UserError: its address is wrong.
    """
    path = tracking_uri(root).removeprefix("sqlite:///")
    if "://" in path:
        return ask_client(root)
    if not Path(path).is_file():
        return Overview([], [], [])
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            runs = [RunRow(*row) for row in database.execute(RUNS, (EXPERIMENT, NEWEST))]
            return Overview(
                runs, [VersionRow(*row) for row in database.execute(VERSIONS)], list(database.execute(ALIASES))
            )
    except sqlite3.Error as error:
        raise Unavailable(f"MLflow's database {path} cannot be read: {error}") from error


def ask_client(root: Path) -> Overview:
    """As `read_overview`, through MLflow's client.

    Raises:
        Unavailable: the store cannot be used.
    """
    client = connect(root)
    infos = [run.info for run in client.search_runs([experiment_id(client)], max_results=NEWEST)]
    versions: list[VersionRow] = []
    aliases: list[tuple[str, str, str]] = []
    for model in client.search_registered_models():
        found = client.search_model_versions(f"name = '{model.name}'", max_results=1000)
        numbered = sorted(found, key=lambda version: -int(version.version))
        versions += [VersionRow(model.name, str(each.version), each.creation_timestamp) for each in numbered]
        aliases += [(model.name, str(number), alias) for alias, number in sorted((model.aliases or {}).items())]
    return Overview([RunRow(i.run_id, i.run_name, i.status, i.start_time) for i in infos], versions, aliases)

"""`lolcats gc`: what no checkout, commit, experiment or version points at, in DVC's cache and in MLflow.

DVC decides what of its cache is used: every branch, tag (each version has one), experiment and worktree counts.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from lolcats_common.errors import UserError
from tasks.runner.git import git_state
from tasks.runner.mlflow_run import connect, experiment_id
from tasks.versioning import dvc_graph

logger = logging.getLogger(__name__)
ABANDONED_SECONDS = 3600.0  # a logged model without a version may belong to a registration that still runs
_REMOVED = re.compile(r"^Removing (?P<path>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Garbage:
    """What nothing points at: objects of DVC's cache and MLflow's logged models by id; bytes on this machine."""

    objects: tuple[str, ...]
    models: tuple[str, ...]
    bytes: int


def collect(root: Path, delete: bool = False, older_than: float = ABANDONED_SECONDS) -> Garbage:
    """Find what nothing points at and, with `delete`, remove it.

    Raises:
        Unavailable: the registry cannot be used.
        UserError: a stage runs at the moment, whose results are not written down yet.
    """
    busy = [path for path in (root, *_worktrees(root)) if _busy(path)]
    if busy:
        raise UserError(f"a stage runs in {busy[0]}; collect garbage when it has ended")
    projects = [argument for path in _worktrees(root) for argument in ("--projects", str(path))]
    committed = ["--all-branches", "--all-tags", "--all-experiments"] if git_state(root)[0] != "unknown" else []
    arguments = ["gc", "--workspace", *committed, "--force", *projects]
    shown = dvc_graph.run_dvc(root, *arguments, "--dry")
    objects = tuple(match["path"] for match in _REMOVED.finditer(shown))
    client = connect(root)
    models = _unused_models(client, older_than)
    places = [place for model in models if (place := _place(model)) is not None]
    size = sum(_size(Path(path)) for path in objects) + sum(_size(place) for place in places)
    if delete:
        dvc_graph.run_dvc(root, *arguments)
        for model in models:
            client.delete_logged_model(model.model_id)
        for place in places:
            shutil.rmtree(place.parent, ignore_errors=True)
    return Garbage(objects, tuple(str(model.model_id) for model in models), size)


def _worktrees(root: Path) -> list[Path]:
    return sorted(path.parent for path in (root / ".worktrees").glob("*/dvc.yaml"))


def _busy(root: Path) -> bool:
    """Whether DVC holds anything for a running stage; it writes this down in its rwlock, and leaves empty entries."""
    try:
        held = json.loads((root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return False
    return any(holders for entry in held.values() for holders in entry.values())


def _unused_models(client: Any, older_than: float) -> list[Any]:
    used = {version.source.rpartition("/")[2] for version in client.search_model_versions(max_results=10_000)}
    latest = (time.time() - older_than) * 1000
    found = client.search_logged_models([experiment_id(client)], max_results=1000)
    return [model for model in found if model.model_id not in used and model.creation_timestamp <= latest]


def _place(model: Any) -> Path | None:
    """Where a logged model lies on this machine, in a folder of its own; None for any other place, which stays."""
    location = urlparse(model.artifact_location)
    place = Path(unquote(location.path))
    return place if location.scheme in ("", "file") and place.parent.name == str(model.model_id) else None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)

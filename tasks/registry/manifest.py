"""The manifest of a registered version: the SHA-256 of every file of its stored model, kept outside of it.

A tag of the version holds the hash of the manifest, so whoever can write files of the store, but not its database,
cannot change what they are held against. The manifest itself lies with the version's run and says which file differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.files import sha256_file, sha256_tree
from tasks.runner.mlflow_run import first_line, is_missing

logger = logging.getLogger(__name__)
TAG, MODEL_TAG = "manifest.sha256", "model.sha256"
# What MLflow writes into a stored model on this machine when it loads it by its name.
META = "registered_model_meta"
_warned: set[str] = set()


def keep_manifest(client: Any, run_id: str, model_id: str, stored: Path) -> str:
    """Write down every file of a model that is about to be stored, as an artifact of its run.

    Returns:
        The manifest's SHA-256, the value of `TAG`.
    """
    _drop_leavings(stored)
    text = _text(_hashes(stored))
    client.log_text(run_id, text, _place(model_id))
    return _digest(text)


def check_stored(client: Any, version: Any, stored: Path) -> None:
    """Hold every file of a stored model against what was registered; nothing of it may be used before.

    Compiled Python is removed first: it would run in place of the source beside it, and Python makes it anew.

    Raises:
        Unavailable: the store does not say what was registered.
        UserError: a file differs, is missing, is not among those registered, or is a link or no plain file; or the
            version's tag is gone although its run keeps a manifest.
    """
    label, expected = f"{version.name} version {version.version}", version.tags.get(TAG)
    try:
        _drop_leavings(stored)
        found = _hashes(stored) if expected else None
        weights = None if expected else sha256_tree(stored / "artifacts" / "model")
    except OSError as error:
        raise UserError(f"{label} is not used: {error.filename} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{label} is not used: {error}") from None
    if found is not None and _digest(_text(found)) == expected:
        return
    kept = _kept(client, version, label)
    if found is not None:
        registered = json.loads(kept) if kept is not None and _digest(kept) == expected else None
        raise UserError(f"{label} is not used: {_difference(registered, found)}; restore its files or register again")
    if kept is not None:
        raise UserError(f"{label} is not used: its tag {TAG}, which its manifest belongs to, is gone; register again")
    if weights != version.tags.get(MODEL_TAG):
        raise UserError(f"{label} is not used: the files of its model are not those that were registered")
    if label not in _warned:
        _warned.add(label)
        logger.warning("%s was registered without a manifest: only its model's files were compared", label)


def _text(hashes: dict[str, str]) -> str:
    return json.dumps(hashes, indent=0, sort_keys=True) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _place(model_id: str) -> str:
    return f"manifests/{model_id}.json"


def _hashes(stored: Path) -> dict[str, str]:
    return {file.relative_to(stored).as_posix(): sha256_file(file) for file in _files(stored)}


def _files(stored: Path) -> Iterator[Path]:
    """Every file below a directory, links and special files refused: what they lead to is nowhere written down."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(stored, onerror=refuse):
        for name in (*folders, *names):
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                raise UserError(f"{path.relative_to(stored).as_posix()} is a link or no plain file")


def _drop_leavings(stored: Path) -> None:
    for folder, folders, _ in os.walk(stored):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
            path = Path(folder) / "__pycache__"
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    (stored / META).unlink(missing_ok=True)


def _kept(client: Any, version: Any, label: str) -> str | None:
    """The manifest that lies with the version's run, whatever stands in it; None where the store says there is none.

    Raises:
        Unavailable: the store does not say.
    """
    import mlflow.artifacts

    place = _place(version.source.rpartition("/")[2])
    try:
        if place not in {item.path for item in client.list_artifacts(version.run_id, "manifests")}:
            return None
        at = client.get_run(version.run_id).info.artifact_uri
        text: str = mlflow.artifacts.load_text(f"{at}/{place}")
    except Exception as error:
        if is_missing(error):
            return None
        raise Unavailable(
            f"{label} is not used: the store does not say what was registered: {first_line(error)}"
        ) from error
    return text


def _difference(registered: dict[str, str] | None, found: dict[str, str]) -> str:
    """The first file that differs, in words."""
    if registered is None:
        return "its files are not those that were registered, and the manifest that would say which is gone"
    name = min(name for name in registered.keys() | found.keys() if registered.get(name) != found.get(name))
    if name not in found:
        return f"{name} is missing"
    return f"{name} is not {'the file that was' if name in registered else 'among the files that were'} registered"

"""What a run started over Prefect's API may override. The person at the machine may override everything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lolcats_common.errors import UserError
from lolcats_common.params import Params, apply_overrides, params_from_dict
from lolcats_common.sources import BUILTIN, find_text, source_path
from tasks.runner.git import git
from tasks.versioning.worktrees import overrides

SOURCES_VARIABLE = "LOLCATS_SOURCES"
# Sections that say what is written outside the project, fetched by itself, measured for the gates, or let through: the
# owner's alone. Without a task and a gap there is nothing that a gate could refuse.
OWNED = ("register", "gates", "relinearize", "evaluate")


def check_allowed(root: Path, preset: str | None, values: Mapping[str, Any] | None) -> None:
    """Refuse overrides that reach further than this machine's owner allows.

    Files are read from the project, but for its hidden folders, and from the directories that `LOLCATS_SOURCES` names
    (joined by ``:``). A teacher's own code runs only where the committed params.yaml trusts this very teacher at this
    very revision. The sections `OWNED` stay as params.yaml and the preset have them.

    Raises:
        ParamsError: a key is unknown, ill-typed or out of range.
        UserError: an override asks for more.
    """
    if not preset and not values:
        return
    committed = yaml.safe_load(git(root, "show", "HEAD:params.yaml"))  # what a worktree lays the overrides over
    base = apply_overrides(committed, overrides(preset, None))
    own, asked = _params(base), _params(apply_overrides(base, overrides(None, values)))
    for section in OWNED:
        _check_owned(section, getattr(own, section), getattr(asked, section))
    if asked.teacher.source not in (own.teacher.source, BUILTIN):
        folder = source_path(asked.teacher.source, root)
        _check_inside(root, "teacher.source", asked.teacher.source, [folder])  # before it is walked through
        _check_inside(root, "teacher.source", asked.teacher.source, _below(folder))
    if asked.data.source not in (own.data.source, BUILTIN):
        _check_inside(root, "data.source", asked.data.source, _texts(asked, root))
    _check_trust(_params(committed), asked)


def _params(values: dict[str, Any]) -> Params:
    return params_from_dict(values, source="params.yaml with the overrides")


def _check_owned(section: str, own: Any, asked: Any) -> None:
    for name, value in dataclasses.asdict(asked).items():
        if value != getattr(own, name):
            raise UserError(
                f"`{section}.{name}` must stay as params.yaml or the preset has it in a run over the API, got {value!r}"
            )


def _texts(asked: Params, root: Path) -> list[Path]:
    """The path that `data.source` names, and every file that is read for it."""
    path = source_path(asked.data.source, root)
    if not _allowed(path, root):
        return [path]  # before anything is said of what is there
    found = find_text(asked.data, root) or []
    return [path, *found, *(file for folder in found for file in _below(folder))]


def _below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if not file.is_dir()] if folder.is_dir() else []


def _check_inside(root: Path, key: str, source: str, paths: list[Path]) -> None:
    for path in paths:
        if not _allowed(path, root):
            raise UserError(
                f"`{key}` leads out of the project's open folders and of {SOURCES_VARIABLE}: {source}"
                + ("" if path == source_path(source, root) else f" (through {path.name})")
            )


def _allowed(path: Path, root: Path) -> bool:
    """Whether a path, links followed, lies in a directory of `LOLCATS_SOURCES` or in the project in plain sight.

    Hidden folders of the project hold logins (.prefect, .dvc) and other runs' work.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(home) and not any(part.startswith(".") for part in real.relative_to(home).parts):
        return True
    named = [place for place in os.environ.get(SOURCES_VARIABLE, "").split(os.pathsep) if place]
    return any(real.is_relative_to(os.path.realpath(source_path(place, root))) for place in named)


def _check_trust(committed: Params, asked: Params) -> None:
    """Trust is given to the code of one teacher at one revision, not to whatever its owner puts there later."""
    teacher, own = asked.teacher, committed.teacher
    same = (teacher.source, teacher.revision) == (own.source, own.revision)
    if teacher.trust_remote_code and not (own.trust_remote_code and same):
        at = f" at {teacher.revision}" if teacher.revision else ""
        raise UserError(
            f"`teacher.trust_remote_code` of {teacher.source}{at} must stand with this source and revision in the"
            " committed params.yaml for a run over the API"
        )

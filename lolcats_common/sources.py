"""What the names in `teacher.source` and `data.source` stand for, told without reading what lies there.

Nothing but the standard library is needed, so a wrong name is refused before torch is imported or anything is started.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams, Params, TeacherParams

BUILTIN = "builtin"
GGUF = ".gguf"
COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_sources(params: Params, root: Path) -> None:
    """Refuse a teacher or a text that is not there; asks no hub and reads no file.

    Raises:
        UserError: a path does not exist or is of the wrong kind, or a Hugging Face id has no commit.
    """
    kind, folder = find_teacher(params.teacher, root)
    if kind == "hub":
        require_commit(params.teacher)
    elif kind == "directory" and not (folder / "config.json").is_file():
        found = sorted(folder.glob(f"*{GGUF}"))
        advice = f"the file {found[0].name} in it" if found else "a saved Hugging Face model"
        raise UserError(f"teacher {params.teacher.source}: config.json is missing; give {advice}")
    find_text(params.data, root)


def find_teacher(params: TeacherParams, root: Path) -> tuple[Literal["builtin", "directory", "gguf", "hub"], Path]:
    """What kind of teacher `source` names and, of a directory or a GGUF file, where it is.

    Raises:
        UserError: it can be none of the four.
    """
    source = params.source
    folder = root / Path(source).expanduser()
    if source == BUILTIN:
        return "builtin", folder
    if folder.is_dir():
        return "directory", folder
    if folder.is_file() and folder.suffix.lower() == GGUF:
        return "gguf", folder
    if folder.exists():
        raise UserError(
            f"teacher {source} is a file; `teacher.source` takes the directory that holds config.json, or a {GGUF} file"
        )
    if folder.suffix.lower() == GGUF:
        raise UserError(f"teacher {source}: no such file; correct `teacher.source`")
    if difflib.get_close_matches(source, [BUILTIN]):
        raise UserError(f"teacher {source}: no such directory; did you mean `builtin`?")
    if _HUB_ID.fullmatch(source):
        return "hub", folder
    raise UserError(
        f"teacher {source}: no such directory, and not a Hugging Face id (owner/name); correct `teacher.source`"
    )


def require_commit(params: TeacherParams) -> str:
    """The commit that pins a Hugging Face id.

    Raises:
        UserError: `revision` is no commit.
    """
    source, revision = params.source, params.revision
    if revision is None or not COMMIT.fullmatch(revision):
        raise UserError(
            f"teacher {source}: no such directory; of the Hugging Face model {source}, `teacher.revision` must be a "
            f"commit of 40 hexadecimal digits, got {'null' if revision is None else repr(revision)}; take one from "
            f"https://huggingface.co/{source}/commits"
        )
    return revision


def find_text(params: DataParams, root: Path) -> list[Path] | None:
    """The file, the directory or the files of a glob that `source` names; None for ``builtin`` and a dataset id.

    Raises:
        UserError: nothing is there, or a dataset id has no pinned commit.
    """
    source, revision = params.source, params.revision
    if source == BUILTIN:
        return None
    path = root / Path(source).expanduser()
    if path.exists():
        return [path]
    if any(c in source for c in "*?["):
        anchor = Path(path.anchor) if Path(source).expanduser().is_absolute() else root
        found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        if not found:
            raise UserError(f"`data.source`: nothing matches {source}")
        return found
    if not _HUB_ID.fullmatch(source):
        raise UserError(f"`data.source`: {source} does not exist")
    if revision is None or not COMMIT.fullmatch(revision):
        raise UserError(
            f"`data.source`: {source} does not exist; of the Hugging Face dataset {source}, `data.revision` must be a "
            f"commit of 40 hex digits (dataset page, Files, History), got {revision!r}"
        )
    return None

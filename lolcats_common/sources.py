"""What the names in `teacher.source` and `data.source` stand for, told without reading what lies there.

`source_path` alone says where a source lies: what checks a source and what reads it see the same path. Nothing but the
standard library is needed, so a wrong name is refused before torch is imported or anything is started.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path
from typing import Literal

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams, Params, TeacherParams

BUILTIN = "builtin"
GGUF = ".gguf"
COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# `datasets` takes a name without an owner, such as text or pandas, for a way to read whatever lies in this directory.
_DATASET_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_NAME_BYTES, _PATH_BYTES = 255, 4096  # what Linux takes


def source_path(source: str, root: Path) -> Path:
    """Where a source lies that is a path or a glob: absolute, with ``~`` expanded and ``..`` taken away.

    Nothing has to be there; ``builtin`` and a hub id have such a path too, at which nothing is.

    Raises:
        UserError: it names a user who is unknown, or can be no path.
    """
    try:
        path = Path(os.path.normpath(root.absolute() / Path(source).expanduser()))
        longest = max((len(part.encode()) for part in path.parts), default=0)
    except RuntimeError:
        raise UserError(f"source {source}: there is no user {Path(source).parts[0]}; give the path itself") from None
    except UnicodeEncodeError:
        raise UserError(f"source {source}: a path must be UTF-8; rename the file") from None
    if "\0" in source:
        raise UserError(f"source {source}: a path must not hold a NUL")
    if longest > _NAME_BYTES or len(str(path).encode()) > _PATH_BYTES:
        shown = source if len(source) <= 80 else source[:80] + "…"
        raise UserError(
            f"source {shown}: a path must have at most {_PATH_BYTES} bytes and {_NAME_BYTES} in each name, "
            f"got {len(str(path).encode())} and {longest}"
        )
    return path


def is_glob(source: str) -> bool:
    """Whether a source holds what stands for several files."""
    return any(c in source for c in "*?[")


def _what_is_at(path: Path, named: str) -> Literal["directory", "file", "special"] | None:
    """What lies at a path, links followed; None for nothing."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{named} cannot be read: {error.strerror}") from None
    return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


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
    folder = source_path(source, root)
    if source == BUILTIN:
        return "builtin", folder
    found = _what_is_at(folder, f"teacher {source}")
    if found == "directory":
        return "directory", folder
    if found == "file" and folder.suffix.lower() == GGUF:
        return "gguf", folder
    if found:
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
    path = source_path(source, root)
    found = _what_is_at(path, f"`data.source`: {source}")
    if found == "special":
        raise UserError(f"`data.source`: {source} must be a file or a directory, not a device, a pipe or a socket")
    if found:
        return [path]
    if is_glob(source):
        if any("**" in part and part != "**" for part in path.parts):
            raise UserError(f"`data.source`: ** must stand alone between slashes, as in data/**/*.jsonl, got {source}")
        anchor = root.absolute() if path.is_relative_to(root.absolute()) else Path(path.anchor)
        files = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        if not files:
            raise UserError(f"`data.source`: nothing matches {source}")
        return files
    if not _DATASET_ID.fullmatch(source):
        raise UserError(f"`data.source`: {source} does not exist, and is no Hugging Face dataset id (owner/name)")
    if revision is None or not COMMIT.fullmatch(revision):
        raise UserError(
            f"`data.source`: {source} does not exist; of the Hugging Face dataset {source}, `data.revision` must be a "
            f"commit of 40 hex digits (dataset page, Files, History), got {revision!r}"
        )
    return None

"""DVC's cache holds every file under the MD5 of its bytes; here it is held to that.

DVC restores what it once stored or pulled without reading it again, so a bit flipped on the disk or in a remote would
come back as a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def drop_damaged(cache: Path, outs: Mapping[Path, str]) -> list[Path]:
    """Remove objects with other bytes than their name says, so that the stage whose outputs they are runs again.

    DVC is made to read the outputs again, which may have been restored from them.

    Args:
        cache: DVC's cache directory.
        outs: the MD5 of each output, by its path.

    Returns:
        The objects that were removed.
    """
    damaged = [path for name in outs.values() for path in _objects(cache, name) if not _is_what_it_says(path)]
    for path in damaged:
        path.unlink()
    for out in outs:
        for file in [out, *out.rglob("*")] if out.exists() else []:
            file.touch()
    return damaged


def _objects(cache: Path, name: str) -> list[Path]:
    """The objects of an output: its own and, where that lists a directory, those of its files."""
    names = [name]
    if name.endswith(".dir"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names += [entry["md5"] for entry in json.loads(_place(cache, name).read_bytes())]
    return [path for path in (_place(cache, each) for each in names) if path.is_file()]


def _place(cache: Path, name: str) -> Path:
    return cache / "files" / "md5" / name[:2] / name[2:]


def _is_what_it_says(path: Path) -> bool:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return md5 == (path.parent.name + path.name).removesuffix(".dir")

"""The files that define lm-eval's tasks: found by a task's name and read as text, before anything of them runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lolcats_common.errors import UserError

RUNS_ANSWERS = "runs the code that the model writes, on this machine and unguarded; leave it out"
OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
_DEFINED = re.compile(r"""^['"]?(?:task|group|tag)['"]?:[ \t]*['"]?([\w.+-]+)['"]?[ \t]*$""", re.MULTILINE)
_INCLUDE = re.compile(r"""^include:[ \t]*['"]?([^'"\n]+?)['"]?[ \t]*$""", re.MULTILINE)
_UNSAFE = re.compile(r"^unsafe_code:[ \t]*true", re.MULTILINE | re.IGNORECASE)
_TAG_LIST = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[^\n]*\n?)+)", re.MULTILINE)
_TAG = re.compile(r"""-[ \t]*['"]?([\w.+-]+)""")


def task_folder(name: str, task_dirs: Sequence[Path]) -> Path:
    """The folder to show lm-eval so that it knows the task; reads no more of its 14 000 files than it must.

    Raises:
        UserError: there is no such task, or it says of itself that it runs what the model writes.
    """
    folder = _find_folder(name, task_dirs)
    if any(_UNSAFE.search(text) for text in _definition(folder, name)):
        raise UserError(f"`evaluate.tasks`: {name} {RUNS_ANSWERS}")
    return folder


def _find_folder(name: str, task_dirs: Sequence[Path]) -> Path:
    for folder in (*task_dirs, OWN_TASKS):
        if name in _names(folder):
            return folder
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    folders = sorted(path for path in shipped.iterdir() if path.is_dir())
    # Most tasks lie in a folder whose name begins theirs: arc_challenge in arc.
    likely = [folder for folder in folders if name.startswith(folder.name)]
    for folder in sorted(likely, key=lambda path: -len(path.name)):
        if name in _names(folder):
            return folder
    known: set[str] = set()
    for folder in (*task_dirs, OWN_TASKS, *folders):
        names = _names(folder)
        if name in names:
            return folder
        known |= names
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    raise UserError(f"`evaluate.tasks` names {name!r}, which lm-eval does not know; did you mean {close[0]!r}?")


def _names(folder: Path) -> set[str]:
    """Names of the tasks, groups and tags that are defined under a folder."""
    names: set[str] = set()
    for file in folder.rglob("*.yaml"):
        text = _text(file)
        names.update(_DEFINED.findall(text))
        for block in _TAG_LIST.findall(text):
            names.update(_TAG.findall(block))
    return names


def _definition(folder: Path, name: str) -> Iterator[str]:
    """The text that defines a task, and those that it includes."""
    files = [file for file in folder.rglob("*.yaml") if name in _DEFINED.findall(_text(file))]
    for file in files:
        yield _text(file)
        included = _INCLUDE.search(_text(file))
        if included is not None and (other := file.parent / included[1]) not in files and other.is_file():
            files.append(other)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")

"""Writing so that a crash leaves the old content or the new, never a part: temporary name, fsync, rename.

Reading JSON and YAML so that whatever stands there becomes a plain value or one line that a person can read.
A disk that refuses is said in one line with the path, whichever library was writing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lolcats_common.errors import DiskRefused, ParamsError, UserError

# Aliases make a few lines stand for any number of values, and whatever reads nested values calls itself.
MOST_VALUES, DEEPEST = 100_000, 32

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# How libraries that write by themselves say it: safetensors, then torch and numpy, which lose the reason, then sqlite.
_REFUSED = re.compile(
    rf"os error ({'|'.join(map(str, REFUSALS))})\b|PytorchStreamWriter failed writing|unexpected pos \d+"
    r"|\d+ requested and \d+ written|database or disk is full"
)


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """Raise `DiskRefused` with `path` where the block fails because the disk takes no more."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise DiskRefused(f"{path}: {reason}; free space there and run the same command again") from error


def _refusal(error: BaseException | None) -> str | None:
    """Why the disk takes no more; None where that is not what happened."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return os.strerror(error.errno)
        if match := _REFUSED.search(str(error)):
            return os.strerror(int(match[1] or errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes its place when the block ends well.

    Raises:
        DiskRefused: the disk takes no more.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            fsync_path(partial)
            partial.replace(path)
            fsync_path(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON with sorted keys atomically; refuses NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The JSON object in a file; whoever calls says which record it is.

    Args:
        remedy: what to do where the file cannot be read, such as "run `dvc repro`".

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    return _objects(path, remedy, lambda text: [text])[0]


def read_json_lines(path: Path, remedy: str) -> list[Any]:
    """The JSON objects in a file that holds one a line; as `read_json`."""
    return _objects(path, remedy, str.splitlines)


def _objects(path: Path, remedy: str, parts: Callable[[str], list[str]]) -> list[Any]:
    try:
        values = [json.loads(part) for part in parts(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    for value in values:
        if not isinstance(value, dict):
            raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}; {remedy}")
    return values


class _Loader(yaml.SafeLoader):
    """Reads ``2024-01-02`` as text: no parameter is a date, and a commit or a name may look like one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str, named: str) -> Any:
    """The plain values of a YAML text, no more of them than a file of parameters holds; `named`: what errors call it.

    Raises:
        ParamsError: it is not YAML, has a number of too many digits, is nested too deeply or stands for too much.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, 1, {}, named)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ParamsError(f"{named} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise _too_deep(named) from None
    except ParamsError:
        raise
    except ValueError as error:  # Python reads no number of more than 4300 digits, and no day 45 of a month
        raise ParamsError(f"{named} holds a value that cannot be read: {str(error).partition(';')[0]}") from None


def _too_deep(named: str) -> ParamsError:
    return ParamsError(f"{named} must be nested at most {DEEPEST} deep")


def _measure(node: Any, depth: int, known: dict[int, tuple[int, int]], named: str) -> tuple[int, int]:
    """How many values a node stands for, each alias counted as what it names, and how deep they are nested."""
    if depth > DEEPEST:
        raise _too_deep(named)
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        below = [_measure(part, depth + 1, known, named) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in below), 1 + max((height for _, height in below), default=0)
    size, height = known[id(node)]
    if size > MOST_VALUES:
        raise ParamsError(f"{named} must stand for at most {MOST_VALUES} values, aliases counted as what they name")
    if depth - 1 + height > DEEPEST:
        raise _too_deep(named)
    return size, height


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path` that replaces it when the block ends well.

    Whoever may read a file that this process makes may read those in it: safetensors writes its files for their owner
    alone.

    Raises:
        DiskRefused: the disk takes no more.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with disk_refusals(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            permissions = partial.stat().st_mode & 0o666
            for file in partial.rglob("*"):
                file.chmod(file.stat().st_mode | permissions)
                fsync_path(file)
            fsync_path(partial)
            if path.exists():
                shutil.rmtree(path)
            partial.replace(path)
            fsync_path(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def files_below(folder: Path, hidden: bool = True) -> Iterator[Path]:
    """Every file of `entries_below`."""
    return (path for path in entries_below(folder, hidden) if path.is_file())


def entries_below(folder: Path, hidden: bool = True) -> Iterator[Path]:
    """Everything below a directory but directories, in no order: files, and links, which are not followed.

    Without `hidden` there is nothing whose path below the directory has a name with a dot first.

    `Path.rglob` passes over what it may not read without a word.

    Raises:
        UserError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        try:
            links = [name for name in folders if Path(parent, name).is_symlink()]
            found = [Path(parent, name) for name in (*names, *links)]
            for path in found:
                path.is_file()  # a directory that can be listed and not entered says so here
        except OSError as error:
            refuse(error)
        yield from found


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 over the names and contents of the files below a directory; compiled Python is left out."""
    digest = hashlib.sha256()
    for file in sorted(file for file in files_below(path) if "__pycache__" not in file.parts):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

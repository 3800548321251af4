"""Raw records from the standard library, local files or a Hugging Face dataset, one at a time in a fixed order.

A record that cannot be read is handed on with its reason instead of ending the run; a source that cannot be read at
all ends it in one `UserError`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError
from lolcats_common.files import entries_below, sha256_file
from lolcats_common.params import DataParams
from lolcats_common.sources import find_text, source_path
from lolcats_core.data.readers import (
    SUFFIXES,
    TEXT_SUFFIXES,
    RawRecord,
    file_records,
    suffix_of,
    text_record,
    without_gaps,
)

# Left out: other people's packages, what Debian splits off into packages of its own, generated tables.
_SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "distutils",
        "ensurepip",
        "pydoc_data",
        "encodings",
        "__pycache__",
    ]
)
logger = logging.getLogger(__name__)
_SKIPPED_NAMES = re.compile(r"_sysconfigdata.*|_sitebuiltins\.py|sitecustomize\.py")


def stdlib_files() -> list[Path]:
    """The running interpreter's standard library in a shuffled but fixed order (by hash of the name)."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]  # os.walk then does not enter the others
        found = [Path(folder, name) for name in names if name.endswith(".py") and not _SKIPPED_NAMES.fullmatch(name)]
        files += [file for file in found if file.stat().st_size > 0]
    return sorted(files, key=lambda file: _name_hash(file.relative_to(root).as_posix()))


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Name and text of each standard-library module."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in stdlib_files():
        yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8", errors="replace")


def local_files(params: DataParams, root: Path) -> list[Path] | None:
    """Files that a local source names, in a fixed order; None where it is a dataset id.

    Text files come in the order of their names' hashes, so that a bound on tokens takes no alphabetical slice.

    Raises:
        UserError: nothing matches, a file has a suffix that cannot be read, a directory holds a link that leads nowhere
            or a data set in a form of its own, or a dataset id has no pinned commit.
    """
    source, named = params.source, find_text(params, root)
    if named is None:
        return None
    found = _files_below(named[0]) if named[0].is_dir() else named
    if not found:
        raise UserError(f"`data.source`: {source} holds no {', '.join(SUFFIXES)} file")
    for file in found:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"`data.source`: the name {file.name} is not UTF-8; rename the file") from None
        if suffix_of(file) is None:
            raise UserError(f"`data.source`: {file.name} must end in {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: (_name_hash(file.name) if suffix_of(file) in TEXT_SUFFIXES else "", file))


def _files_below(folder: Path) -> list[Path]:
    """Readable files, hidden and empty ones left out, and of those the kinds that are records.

    Beside data files, text files are none (a README, a licence); beside other data or text, .json files are none (the
    description of a data set, the settings of a program).

    Raises:
        UserError: a link leads nowhere, or the files are those of `datasets.save_to_disk`.
    """
    here, files = list(entries_below(folder, hidden=False)), list[Path]()
    for file in here:
        if suffix_of(file) is not None and not file.is_dir():
            if not file.exists():
                raise UserError(f"`data.source`: {file} is a link to {file.readlink()}, which does not exist")
            if file.stat().st_size > 0:
                files.append(file)
    texts = [file for file in files if suffix_of(file) in TEXT_SUFFIXES]
    tables = [file for file in files if suffix_of(file) not in (*TEXT_SUFFIXES, ".json")]
    if not tables and any(file.suffix == ".arrow" for file in here):
        advice = 'datasets.load_from_disk(...).to_parquet("text.parquet")'
        raise UserError(f"`data.source`: {folder} holds .arrow files, which are not read; write Parquet: {advice}")
    said = any(file.stem.upper() not in ("README", "LICENSE") for file in texts)
    return tables or (texts if said else [file for file in files if file not in texts]) or files


def _left_out(folder: Path, read: list[Path]) -> str:
    """What lies in a folder and is not read, by kind, such as ``2 .csv, 1 link to a folder``."""

    def kind(at: Path) -> str:
        if at.is_dir():
            return "link to a folder"
        return "empty" if at.is_file() and at.stat().st_size == 0 else at.suffix.lower() or "without a suffix"

    others = set(entries_below(folder, hidden=False)) - set(read)
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(map(kind, others)).items()))


def describe(params: DataParams, root: Path, sha256: Callable[[Path], str] = sha256_file) -> dict[str, Any]:
    """What is read, for the record: kind, revision and the SHA-256 of every local file, as `sha256` gives it.

    Raises:
        UserError: the source does not exist, or a dataset id has no pinned commit.
    """
    if params.source == "builtin":
        base = Path(sysconfig.get_path("stdlib"))
        hashes = {file.relative_to(base).as_posix(): sha256(file) for file in stdlib_files()}
        return {"kind": "builtin", "source": params.source, "revision": None, "files": hashes}
    files = local_files(params, root)
    if files is not None:
        return {
            "kind": "local",
            "source": params.source,
            "revision": None,
            "files": {_relative(file, root): _hash(file, sha256) for file in files},
        }
    return {"kind": "hub", "source": params.source, "revision": params.revision, "subset": params.subset, "files": {}}


def raw_records(params: DataParams, root: Path) -> Iterator[RawRecord]:
    """Every record of the source in a fixed order, in bounded memory.

    Raises:
        UserError: the source cannot be read at all.
    """
    if params.source == "builtin":
        base = Path(sysconfig.get_path("stdlib"))
        for file in stdlib_files():
            yield text_record(file, file.relative_to(base).as_posix(), params.max_record_bytes)
        return
    files = local_files(params, root)
    if files is None:
        yield from _hub_records(params)
        return
    path = source_path(params.source, root)
    if path.is_dir() and (others := _left_out(path, files)):
        logger.warning("`data.source`: of %s %d files are read; not read: %s", params.source, len(files), others)
    for file in files:
        try:
            yield from file_records(file, _relative(file, root), params.max_record_bytes)
        except OSError as error:
            raise UserError(f"`data.source`: {file} cannot be read: {error.strerror or error}") from None


def _relative(file: Path, root: Path) -> str:
    """The file's name for records: relative to the project where it lies inside."""
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _hash(file: Path, sha256: Callable[[Path], str]) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"`data.source`: {file} cannot be read: {error.strerror or error}") from None


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _hub_records(params: DataParams) -> Iterator[RawRecord]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    name = f"{params.source} at {params.revision}"
    try:
        rows = datasets.load_dataset(
            params.source, name=params.subset, split=params.split, revision=params.revision, streaming=True
        )
        for number, fields in enumerate(rows, 1):
            yield RawRecord(f"{params.source}:{number}", without_gaps(dict(fields)))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"`data.source`: {name} was not found, or is gated (accept its terms and set HF_TOKEN): {error}"
        ) from None
    except (ConnectionError, OSError, HfHubHTTPError) as error:
        raise UserError(
            f"`data.source`: {name} cannot be reached ({type(error).__name__}); go online, unset HF_HUB_OFFLINE,"
            " or give a local .jsonl or .parquet file"
        ) from None
    except ValueError as error:
        raise UserError(f"`data.source`: {name} cannot be read: {error}") from None

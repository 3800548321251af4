"""Raw records from the standard library, local files or a Hugging Face dataset, one at a time in a fixed order.

A record that cannot be read is handed on with its reason instead of ending the run; a source that cannot be read at
all ends it in one `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file
from lolcats_common.params import DataParams
from lolcats_common.sources import find_text

TEXT_SUFFIXES = (".txt", ".py", ".md")
SUFFIXES = (".jsonl", ".parquet", *TEXT_SUFFIXES)
COLUMNS = ("text", "instruction", "input", "output", "messages")
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
_SKIPPED_NAMES = re.compile(r"_sysconfigdata.*|_sitebuiltins\.py|sitecustomize\.py")
# Text that Windows programs write begins with a byte order mark, which is no part of it.
UTF8 = "utf-8-sig"
_LONG_TEXT = 1 << 16  # bytes from which a .txt file is cut into documents


@dataclass(frozen=True)
class RawRecord:
    """One record: where it stands and its fields, or the reason why it could not be read."""

    where: str
    fields: dict[str, Any] | None = None
    reason: str | None = None


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
        UserError: nothing matches, a file has a suffix that cannot be read, or a dataset id has no pinned commit.
    """
    source, named = params.source, find_text(params, root)
    if named is None:
        return None
    found = _files_below(named[0]) if named[0].is_dir() else named
    if not found:
        raise UserError(f"`data.source`: {source} holds no {', '.join(SUFFIXES)} file")
    for file in found:
        if file.suffix not in SUFFIXES:
            raise UserError(f"`data.source`: {file.name} must end in {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: (_name_hash(file.name) if file.suffix in TEXT_SUFFIXES else "", file))


def _files_below(folder: Path) -> list[Path]:
    """Readable files, hidden ones left out; beside data files, text files (a README, a licence) are no records."""
    files = [
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return [file for file in files if file.suffix not in TEXT_SUFFIXES] or files


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
            yield _text_file(file, file.relative_to(base).as_posix(), params.max_record_bytes)
        return
    files = local_files(params, root)
    if files is None:
        yield from _hub_records(params)
        return
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _jsonl_records(file, params.max_record_bytes)
            elif file.suffix == ".parquet":
                yield from _parquet_records(file)
            elif file.suffix == ".txt" and file.stat().st_size > _LONG_TEXT:
                yield from _text_parts(file)
            else:
                yield _text_file(file, _relative(file, root), params.max_record_bytes)
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


def _text_parts(file: Path) -> Iterator[RawRecord]:
    """A long text in documents of 32 to 64 KiB that end at an empty line; where there is none, at any line's end."""
    with file.open("rb") as stream:
        start, held = 0, b""
        while chunk := stream.read(_LONG_TEXT - len(held)):
            held += chunk
            cut = len(held) if len(held) < _LONG_TEXT else _cut(held)
            yield _decoded(f"{file.name}:byte {start}", held[:cut])
            start, held = start + cut, held[cut:]
        if held:
            yield _decoded(f"{file.name}:byte {start}", held)


def _cut(data: bytes) -> int:
    """Where the first document of `data` ends: in the second half, and never inside a UTF-8 character."""
    half = len(data) // 2
    for end in (b"\n\n", b"\n"):
        if (found := data.rfind(end, half)) >= 0:
            return found + len(end)
    cut = len(data) - 1
    while cut > len(data) - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _decoded(where: str, data: bytes) -> RawRecord:
    try:
        return RawRecord(where, {"text": data.decode(UTF8)})
    except UnicodeDecodeError as error:
        return RawRecord(where, reason=f"not UTF-8 at byte {error.start}")


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _text_file(file: Path, where: str, limit: int) -> RawRecord:
    try:
        size = file.stat().st_size
        if size > limit:
            return RawRecord(where, reason=f"{size} bytes, above `data.max_record_bytes` {limit}")
        return RawRecord(where, {"text": file.read_text(encoding=UTF8)})
    except UnicodeDecodeError as error:
        return RawRecord(where, reason=f"not UTF-8 at byte {error.start}")
    except OSError as error:
        return RawRecord(where, reason=f"cannot be read: {error.strerror}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _jsonl_records(file: Path, limit: int) -> Iterator[RawRecord]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(limit + 2):
            number += 1
            where = f"{file.name}:{number}"
            if len(line) > limit + 1 or (len(line) == limit + 1 and not line.endswith(b"\n")):
                while line and not line.endswith(b"\n"):
                    line = lines.readline(limit)
                yield RawRecord(where, reason=f"longer than `data.max_record_bytes` {limit}")
                continue
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode(UTF8), parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                yield RawRecord(where, reason=f"not UTF-8 at byte {error.start}")
            except (ValueError, RecursionError) as error:
                yield RawRecord(where, reason=f"not valid JSON: {error}")
            else:
                known = isinstance(value, dict)
                reason = None if known else f"not an object but {type(value).__name__}"
                yield RawRecord(where, value if known else None, reason)


def _parquet_records(file: Path) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file)
        columns = [name for name in parquet.schema_arrow.names if name in COLUMNS] or None
        for batch in parquet.iter_batches(batch_size=64, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                where = f"{file.name}:{number}"
                try:
                    yield RawRecord(where, batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError as error:
                    yield RawRecord(where, reason=f"not UTF-8 at byte {error.start}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"`data.source`: {file} is damaged after row {number}: {error}") from None


def _hub_records(params: DataParams) -> Iterator[RawRecord]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    name = f"{params.source} at {params.revision}"
    try:
        rows = datasets.load_dataset(
            params.source, name=params.subset, split=params.split, revision=params.revision, streaming=True
        )
        for number, fields in enumerate(rows, 1):
            yield RawRecord(f"{params.source}:{number}", dict(fields))
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

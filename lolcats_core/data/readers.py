"""Records of one file of each kind that can be read, one at a time in bounded memory.

A record that cannot be read is handed on with its reason instead of ending the run.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lolcats_common.errors import UserError
from lolcats_core.data.parquet_pages import Page, longest_text, read_pages

TEXT_SUFFIXES = (".txt", ".py", ".md")
_LINES = (".jsonl", ".ndjson")
_JSON = tuple(kind + packed for kind in (*_LINES, ".json") for packed in ("", ".gz", ".zst"))
SUFFIXES = (*_JSON, ".parquet", *TEXT_SUFFIXES)
COLUMNS = (
    *("text", "instruction", "input", "output", "history", "system"),
    *("messages", "conversations", "tools", "functions"),
)
# Text that Windows programs write begins with a byte order mark, which is no part of it.
UTF8 = "utf-8-sig"
_LONG_TEXT = 1 << 16  # bytes from which a .txt file is cut into documents
_CHUNK = 1 << 20  # bytes that are read at a time
_ROWS, _ROW_BYTES = 64, 1 << 22  # of a Parquet file: most rows at a time, and bytes of them
# Of a page of a Parquet file: bytes and values that any may decode to, how many times more than it takes in the file it
# may be beyond that, and the most bytes. A page of one letter takes next to nothing in the file, and no text that
# people wrote is packed a thousandfold.
_DECODED_BYTES, _VALUES, _PACKED, _PAGE_BYTES = 1 << 26, 1 << 24, 1000, 1 << 28
# What means something in JSON outside a string, and inside one.
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\],]'), re.compile(rb'["\\]')


@dataclass(frozen=True)
class RawRecord:
    """One record: where it stands and its fields, or the reason why it could not be read."""

    where: str
    fields: dict[str, Any] | None = None
    reason: str | None = None


def suffix_of(file: Path) -> str | None:
    """The one of `SUFFIXES` that the file's name ends in, in letters of either case, if any."""
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def file_records(file: Path, where: str, limit: int) -> Iterator[RawRecord]:
    """Every record of a file whose suffix is known, in order.

    Args:
        where: what a text file, which is one record, is called.
        limit: most bytes of a record.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be read.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        yield from _parquet_records(file, limit)
    elif suffix in _JSON:
        yield from _json_records(file, limit)
    elif suffix == ".txt" and file.stat().st_size > _LONG_TEXT:
        yield from _text_parts(file)
    else:
        yield text_record(file, where, limit)


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


def text_record(file: Path, where: str, limit: int) -> RawRecord:
    """A whole file as one text, called `where`, or the reason why it is none; `limit`: most bytes of it."""
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


def _json_records(file: Path, limit: int) -> Iterator[RawRecord]:
    """One record a line, or in .json the elements of an array or a row of objects, however they are laid out."""
    entries = _lines if str(suffix_of(file)).startswith(_LINES) else _values
    try:
        with _opened(file) as stream:
            for number, entry in enumerate(entries(stream, limit), 1):
                if entry is None:
                    yield RawRecord(f"{file.name}:{number}", reason=f"longer than `data.max_record_bytes` {limit}")
                elif entry.strip():
                    yield _json_record(f"{file.name}:{number}", entry)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"`data.source`: {file} is damaged: {error}") from None


def _json_record(where: str, entry: bytes) -> RawRecord:
    try:
        value = json.loads(entry.decode(UTF8), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return RawRecord(where, reason=f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RawRecord(where, reason=f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return RawRecord(where, reason=f"not an object but {type(value).__name__}")
    return RawRecord(where, value)


def _opened(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if file.suffix.lower() == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")), _CHUNK)
    return file.open("rb")


def _lines(stream: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Every line; None for one of more than `limit` bytes."""
    while line := stream.readline(limit + 2):
        if len(line) > limit + 1 or (len(line) == limit + 1 and not line.endswith(b"\n")):
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            yield None
        else:
            yield line


def _values(stream: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """The elements of a JSON array, or objects one after another, uninterpreted; None for one of over `limit` bytes.

    Only brackets and strings are followed, so that no more than one element is held.

    Raises:
        EOFError: the file ends inside one.
    """
    chunk = stream.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    array = chunk[:1] == b"["
    value, over = bytearray(), False
    depth, at, quoted = 0, 0, False

    def ended(part: bytes) -> bytes | None:
        nonlocal value, over
        whole = bytes(value + part)
        result = None if over or len(whole) > limit else whole
        value, over = bytearray(), False
        return result

    while chunk:
        start = 0
        while found := (_INSIDE if quoted else _OUTSIDE).search(chunk, at):
            at, mark = found.end(), found.group()
            if mark == b"\\":
                at += 1  # what follows is no end of the string, be it in the next chunk
            elif mark == b'"':
                quoted = not quoted
            elif mark in (b"[", b"{"):
                depth += 1
                if array and depth == 1:
                    start = at
            elif mark in (b"]", b"}"):
                depth = max(0, depth - 1)
                if depth == 0:
                    entry = ended(chunk[start : found.start() if array else at])
                    start = at
                    if entry is None or entry.strip():
                        yield entry
            elif array and depth == 1:
                yield ended(chunk[start : found.start()])
                start = at
        value += chunk[start:]
        if len(value) > limit:
            value, over = bytearray(), True
        at = max(0, at - len(chunk))
        chunk = stream.read(_CHUNK)
    if quoted or depth:
        raise EOFError("the JSON in it does not end")
    if over or value.strip():
        yield ended(b"")


def _parquet_records(file: Path, limit: int) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        footer = pq.read_metadata(file)
        names = [name for name in footer.schema.to_arrow_schema().names if name in COLUMNS] or None
        row_bytes, texts = _check_pages(file, footer, names)
        rows = min(_ROWS, max(1, _ROW_BYTES // max(row_bytes, 1)))
        # With a buffer of its own a column is read piece by piece, otherwise a whole row group at once. A value that
        # stands in a dictionary stays there and is not written out for every row and every element of a list.
        parquet = pq.ParquetFile(file, buffer_size=_CHUNK, pre_buffer=False, read_dictionary=texts)
        for batch in parquet.iter_batches(batch_size=rows, columns=names):
            small = _decoded_size(batch.to_struct_array()) <= _ROW_BYTES
            for index in range(batch.num_rows):
                number += 1
                where, row = f"{file.name}:{number}", batch.slice(index, 1)
                size = 0 if small else _decoded_size(row.to_struct_array())
                if size > limit:
                    yield RawRecord(where, reason=f"{size} bytes, above `data.max_record_bytes` {limit}")
                    continue
                try:
                    yield RawRecord(where, without_gaps(row.to_pylist()[0]))
                except UnicodeDecodeError as error:
                    yield RawRecord(where, reason=f"not UTF-8 at byte {error.start}")
    except UserError:
        raise
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        reason = " ".join(str(error).split()) or "it takes more memory than there is"
        raise UserError(f"`data.source`: {file} is damaged after row {number}: {reason}") from None


def _check_pages(file: Path, footer: Any, names: list[str] | None) -> tuple[int, list[str]]:
    """What the pages' own headers say: bytes of a row at most or on average, and the columns to read as dictionaries.

    The latter are texts in lists that would take too much if each element were written out.

    Raises:
        UserError: a page decodes to so much more than the file holds of it that it is no text.
        ValueError: there are no pages where the footer says.
    """
    row_bytes, texts = 0, dict[str, None]()
    with file.open("rb") as opened:
        for index in range(footer.num_row_groups):
            group, total = footer.row_group(index), 0
            for place in range(group.num_columns):
                chunk = group.column(place)
                if names is not None and chunk.path_in_schema.split(".")[0] not in names:
                    continue
                first = chunk.dictionary_page_offset or chunk.data_page_offset
                start = min(first, chunk.data_page_offset)
                values = stored = longest = repeated = 0
                for page in read_pages(opened, start, chunk.total_compressed_size):
                    values, stored, total = values + page.values, stored + page.stored, total + page.size
                    most = min(_PAGE_BYTES, max(_DECODED_BYTES, _PACKED * page.stored))
                    if page.size > most or values > max(_VALUES, _PACKED * stored):
                        raise UserError(
                            f"`data.source`: {file} is refused: {page.stored} bytes of its column "
                            f"{chunk.path_in_schema} decode to {page.size} bytes and {values} values; it may be packed "
                            f"at most {_PACKED} times, and a page hold at most {_PAGE_BYTES} bytes"
                        )
                    repeated += page.values * page.indices
                    row_bytes = max(row_bytes, page.size // max(page.values, 1))
                    if page.dictionary and chunk.physical_type == "BYTE_ARRAY":
                        longest = _longest(opened, page, chunk.compression)
                if footer.schema.column(place).max_repetition_level == 0:
                    row_bytes = max(row_bytes, longest)
                elif longest * repeated > _DECODED_BYTES:
                    texts[chunk.path_in_schema] = None
            row_bytes = max(row_bytes, total // max(group.num_rows, 1))
    return row_bytes, list(texts)


def _longest(opened: IO[bytes], page: Page, codec: str) -> int:
    """Bytes of the longest text of a dictionary's page; those of the whole page where it cannot be told."""
    import pyarrow as pa

    opened.seek(page.at)
    content = opened.read(page.stored)
    if codec == "UNCOMPRESSED":
        return longest_text(content)
    if codec not in ("SNAPPY", "GZIP", "ZSTD", "BROTLI"):
        return page.size
    return longest_text(pa.Codec(codec.lower()).decompress(content, page.size, asbytes=True))


def _decoded_size(array: Any) -> int:
    """Bytes that an array's texts take once each stands for itself, its other values counted as eight."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_decoded_size, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return 8 * len(array) + _decoded_size(array.flatten() if not pa.types.is_map(kind) else array.items)
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        return int(pc.sum(pc.binary_length(array).cast(pa.int64())).as_py() or 0)
    return 8 * len(array)


def without_gaps(fields: dict[str, Any]) -> dict[str, Any]:
    """A table's record without the keys of nested objects that it does not have.

    A column of objects has one type, so each of them has every key that any has, with nothing in those it lacks.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(one) for one in value]
        return {key: kept(one) for key, one in value.items() if one is not None} if isinstance(value, dict) else value

    return {name: kept(value) for name, value in fields.items()}

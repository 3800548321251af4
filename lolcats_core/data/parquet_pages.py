"""What the pages of a Parquet file say of themselves, read from the headers that stand before them.

A file's footer may say anything; what a reader allocates and decodes follows these headers, in Thrift's compact
protocol (https://parquet.apache.org/docs/file-format/data-pages/).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

_MOST = 1 << 16  # bytes of a header; statistics in it may be long
_STOP, _TRUE, _FALSE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 7, 8, 9, 10, 11, 12
_DICTIONARY = 2  # a page's type
_KINDS = {5: 2, 7: 2, 8: 4}  # fields that hold the header of a page's kind, and of them the one that holds its encoding
_INDICES = (2, 8)  # encodings whose values stand in the dictionary


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        at: byte of the file at which its content begins. stored: bytes of it there.
        size: bytes that these decompress to.
        values: levels in it, each a value, a gap or an empty list. dictionary: it holds a dictionary.
        indices: its values stand in one.
    """

    at: int
    stored: int
    size: int
    values: int
    dictionary: bool
    indices: bool


def read_pages(file: IO[bytes], start: int, length: int) -> Iterator[Page]:
    """The pages of a column chunk, which lies at byte `start`.

    Raises:
        ValueError: what lies there are no pages.
    """
    at, end = start, start + length
    while at < end:
        file.seek(at)
        header = _Header(file.read(min(_MOST, end - at)))
        fields = header.struct(0)
        kind: dict[int, Any] = {}
        encoding = 0
        for number, place in _KINDS.items():
            if isinstance(fields.get(number), dict):
                kind, encoding = fields[number], place
        size, stored, values = (
            found if type(found) is int else -1 for found in (fields.get(2), fields.get(3), kind.get(1, 0))
        )
        if min(size, stored, values) < 0:
            raise ValueError(f"no page begins at byte {at}")
        dictionary, indices = fields.get(1) == _DICTIONARY, kind.get(encoding) in _INDICES
        yield Page(at + header.at, stored, size, values, dictionary, indices and not dictionary)
        at += header.at + stored


def longest_text(content: bytes) -> int:
    """Bytes of the longest value of a dictionary of texts, each with its length before it."""
    at = longest = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, len(content))


class _Header:
    """Reads one struct of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("a page's header is cut short")
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a page's header holds a number of more than 64 bits")

    def signed(self) -> int:
        value = self.number()
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int) -> dict[int, Any]:
        """Values by the numbers of their fields."""
        if depth > 8:
            raise ValueError("a page's header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self.byte()) & 15 != _STOP:
            number = number + (head >> 4) if head >> 4 else self.signed()
            fields[number] = self.value(head & 15, depth)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BINARY:
            length = self.number()
            self.at += length
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _STRUCT:
            return self.struct(depth + 1)
        elif kind in (_LIST, _SET, _MAP):
            raise ValueError("a page's header holds a list, and has no place for one")
        elif kind == 3:
            self.at += 1
        else:
            return self.signed()
        return None

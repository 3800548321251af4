"""The header of a GGUF file: its metadata, and where each tensor lies. Nothing of the weights is read.

The package `gguf` reads headers too, but takes half a minute for a vocabulary of 128 000 tokens, and this is asked
before a run starts anything.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError

# By GGUF's number of a value's type; 8 is a string and 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """`shape` as torch counts (rows first); `kind`: GGUF's number of its type; `start`: its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """`values`: metadata by key, of an array its length alone; `tensors` by name."""

    values: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path, source: str) -> Header:
    """The header of a GGUF file of version 2 or 3.

    Raises:
        UserError: the file cannot be read, is no GGUF file, or its header is cut short or malformed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _Reader(memory).header()
    except OSError as error:
        raise UserError(f"teacher {source}: the file cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
        raise UserError(
            f"teacher {source} is no GGUF file of version 2 or 3, or is damaged; fetch or copy it again"
        ) from None


class _Reader:
    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.place = memory, 0

    def header(self) -> Header:
        magic, version, tensors, values = self.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("no GGUF")
        read = {self.string(): self.value(*self.take("I")) for _ in range(values)}
        listed = [(self.string(), self.take(f"{self.take('I')[0]}Q"), *self.take("IQ")) for _ in range(tensors)]
        alignment = read.get("general.alignment", 32)
        start = -(-self.place // alignment) * alignment
        return Header(
            read, {name: StoredTensor(shape[::-1], kind, start + offset) for name, shape, kind, offset in listed}
        )

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.memory, self.place)
        self.place += struct.calcsize("<" + form)
        return found

    def string(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.memory) - self.place:
            raise ValueError("a string beyond the end")
        self.place += length
        return self.memory[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_NUMBERS[kind])[0]
        item, count = self.take("IQ")
        if item in _NUMBERS:
            self.place += count * struct.calcsize("<" + _NUMBERS[item])
        else:
            for _ in range(count):
                self.value(item)
        return count

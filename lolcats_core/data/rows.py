"""Token rows on disk: fixed-length rows in memory-mapped column files, so that a corpus may be larger than memory.

A directory holds `rows.json` (the header) and one `<column>.bin` per column, little-endian, row after row.

# n rows asked for, R rows in all, L sequence_length
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory, sha256_file, write_json

HEADER = "rows.json"
COLUMNS = ("input_ids", "position_ids", "loss_mask")
_DTYPES = ("|u1", "<u2", "<u4")
_REDO = "run the prepare stage again"


class TokenRows:
    """Rows of token ids, read from disk when asked for. Made by `TokenRows.open`.

    Attributes:
        path: the directory.
        sequence_length: tokens per row, L.
        columns: ``input_ids`` and, where written, ``position_ids`` and ``loss_mask``.
        vocab_size: every id lies in [0, vocab_size).
    """

    path: Path
    sequence_length: int
    columns: tuple[str, ...]
    vocab_size: int

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.sequence_length = header["sequence_length"]
        self.columns = tuple(header["columns"])
        self.vocab_size = header["vocab_size"]
        self._header = header
        self._rows: int = header["rows"]
        self._data = {name: self._map(name) for name in self.columns}

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> TokenRows:
        """Open a directory of rows; reads only the header and the files' sizes.

        Args:
            path: the directory that a `TokenRowsWriter` made.
            verify: also read every byte and compare it with the header's SHA-256.

        Raises:
            UserError: the directory is absent, not one of rows, half-written or damaged.
        """
        path = Path(path)
        header = _read_header(path)
        for name in header["columns"]:
            file = path / f"{name}.bin"
            expected = header["rows"] * header["sequence_length"] * np.dtype(header["dtype"][name]).itemsize
            if not file.is_file():
                raise UserError(f"{file}: missing, though {HEADER} names this column; {_REDO}")
            size = file.stat().st_size
            if size != expected:
                raise UserError(f"{file}: has {size} bytes where {HEADER} says {expected}, so it is damaged; {_REDO}")
            if verify and sha256_file(file) != header["sha256"][name]:
                raise UserError(f"{file}: its SHA-256 differs from the one in {HEADER}, so it is damaged; {_REDO}")
        return cls(path, header)

    def __len__(self) -> int:
        return self._rows

    @property
    def tokens(self) -> int:
        """Tokens in all rows, R * L."""
        return self._rows * self.sequence_length

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the content: of the columns' names, types and hashes."""
        return hashlib.sha256(json.dumps(self._header, sort_keys=True).encode()).hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Rows `indices`, in that order, as fresh tensors [n, L].

        Returns:
            ``input_ids`` int64 and, where the column was written, ``position_ids`` int64 (starting again with each
            document in a row) and ``loss_mask`` bool (True where the token counts as a *target*). An absent
            ``position_ids`` means 0 … L-1, an absent ``loss_mask`` all True.

        Raises:
            IndexError: an index lies outside [-R, R).
            UserError: an id is not below `vocab_size`: the file was damaged after it was written.
        """
        where = np.asarray(indices, dtype=np.int64)
        batch = {}
        for name, column in self._data.items():
            values = column[where]
            if name == "input_ids" and values.size and int(values.max()) >= self.vocab_size:
                raise UserError(
                    f"{self.path}: holds token id {values.max()} where ids must be below {self.vocab_size}, so it is "
                    f"damaged; {_REDO}"
                )
            batch[name] = torch.from_numpy(values.astype(np.bool_ if name == "loss_mask" else np.int64))
        return batch

    def _map(self, name: str) -> np.ndarray:
        shape = (self._rows, self.sequence_length)
        dtype = np.dtype(self._header["dtype"][name])
        if not self._rows:  # an empty file cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(self.path / f"{name}.bin", dtype=dtype, mode="r", shape=shape)


def open_split(folder: Path) -> tuple[TokenRows, TokenRows]:
    """Training and validation rows in the directory of stage `prepare`.

    Raises:
        UserError: as `TokenRows.open`.
    """
    return TokenRows.open(folder / "train"), TokenRows.open(folder / "validation")


class TokenRowsWriter:
    """Writes rows as they come; the directory appears, complete, when the ``with`` block ends well.

    Args:
        path: the directory to make (an existing one is replaced).
        sequence_length: tokens per row, L.
        vocab_size: ids must lie in [0, vocab_size).
        columns: ``input_ids`` and any of ``position_ids`` and ``loss_mask``.
        positions: position ids lie in [0, positions); L by default.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        sequence_length: int,
        vocab_size: int,
        columns: Sequence[str] = ("input_ids",),
        positions: int | None = None,
    ) -> None:
        unknown = [name for name in columns if name not in COLUMNS]
        if unknown or "input_ids" not in columns or len(set(columns)) != len(columns):
            raise ValueError(f"`columns` must be input_ids and any of {', '.join(COLUMNS[1:])}, got {tuple(columns)}")
        if sequence_length < 1 or vocab_size < 1:
            raise ValueError(
                f"`sequence_length` and `vocab_size` must be positive, got {sequence_length}, {vocab_size}"
            )
        self.path = Path(path)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.columns = tuple(columns)
        self.rows = 0
        limits = {"input_ids": vocab_size, "position_ids": positions or sequence_length, "loss_mask": 2}
        self._limits = {name: limits[name] for name in self.columns}
        self._dtypes = {name: _smallest_dtype(limit) for name, limit in self._limits.items()}
        self._stack = contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {name: hashlib.sha256() for name in self.columns}

    def __enter__(self) -> TokenRowsWriter:
        self._partial = self._stack.enter_context(atomic_directory(self.path))
        for name in self.columns:
            self._files[name] = self._stack.enter_context((self._partial / f"{name}.bin").open("wb"))
        return self

    def append(self, **columns: Any) -> None:
        """Append one row [L] or several [n, L]; one argument per column of the writer.

        Raises:
            UserError: a token id lies outside [0, vocab_size).
            ValueError: a column is missing, not one of the writer's, or has the wrong shape or range.
        """
        if set(columns) != set(self.columns):
            raise ValueError(f"columns must be {self.columns}, got {tuple(columns)}")
        arrays = {name: np.atleast_2d(np.asarray(values)) for name, values in columns.items()}
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) != 1 or (shape := shapes.pop())[1:] != (self.sequence_length,):
            raise ValueError(f"rows must be [n, {self.sequence_length}] in every column, got {sorted(shapes)}")
        for name, array in arrays.items():
            self._check_range(name, array)
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, dtype=self._dtypes[name]).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)
        self.rows += shape[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            for file in self._files.values():
                file.close()
            header = {
                "rows": self.rows,
                "sequence_length": self.sequence_length,
                "vocab_size": self.vocab_size,
                "columns": list(self.columns),
                "dtype": {name: dtype.str for name, dtype in self._dtypes.items()},
                "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
            }
            write_json(self._partial / HEADER, header)

    def _check_range(self, name: str, array: np.ndarray) -> None:
        if not array.size:
            return
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high < self._limits[name]:
            return
        value = low if low < 0 else high
        if name == "input_ids":
            raise UserError(
                f"token id {value} lies outside the teacher's vocabulary of {self.vocab_size} ids; the tokenizer does "
                "not belong to this model, use the one it was trained with"
            )
        raise ValueError(f"`{name}` must lie in [0, {self._limits[name]}), got {value}")


def _smallest_dtype(limit: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds 0 … limit - 1."""
    return np.dtype(next(code for code in _DTYPES if limit <= 2 ** (8 * np.dtype(code).itemsize)))


def _read_header(path: Path) -> dict[str, Any]:
    file = path / HEADER
    if not path.is_dir():
        raise UserError(f"{path}: no such directory of token rows; run the prepare stage first")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: holds no {HEADER}, so it is half-written or not token rows; {_REDO}") from None
    except ValueError:
        raise UserError(f"{file}: not valid JSON, so it is damaged; {_REDO}") from None
    if not _is_header(header):
        raise UserError(f"{file}: not a header of token rows, so it is damaged or from another version; {_REDO}")
    return header


def _is_header(header: Any) -> bool:
    if not isinstance(header, dict):
        return False
    whole = (header.get("rows"), header.get("sequence_length"), header.get("vocab_size"))
    columns, dtypes, hashes = header.get("columns"), header.get("dtype"), header.get("sha256")
    if not all(isinstance(number, int) and number >= 0 for number in whole):
        return False
    if not (isinstance(columns, list) and isinstance(dtypes, dict) and isinstance(hashes, dict)):
        return False
    known = "input_ids" in columns and all(name in COLUMNS for name in columns)
    return known and all(dtypes.get(name) in _DTYPES and isinstance(hashes.get(name), str) for name in columns)

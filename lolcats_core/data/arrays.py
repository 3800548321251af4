"""Rows cut from one array of token ids, in memory or in a .npy file.

# n rows asked for, N tokens of the array, L sequence_length
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file


class ArrayRows:
    """Consecutive rows of a token array.

    Args:
        tokens: ids [N] of any whole type; what is left after the last whole row is not used.
        max_rows: take at most so many rows, evenly spread over the array.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, vocab_size: int, max_rows: int | None = None) -> None:
        count = len(tokens) // sequence_length
        self._rows = tokens[: count * sequence_length].reshape(count, sequence_length)
        if max_rows is not None and count > max_rows:
            # Spread over the whole array, so that a part of it still stands for all of it.
            self._rows = self._rows[np.linspace(0, count - 1, max_rows).astype(int)]
        self.sequence_length, self.vocab_size = sequence_length, vocab_size

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Rows `indices`: ``input_ids`` int64 [n, L]."""
        return {"input_ids": torch.from_numpy(self._rows[np.asarray(indices)].astype(np.int64))}


class TokenFileRows(ArrayRows):
    """Rows cut from a .npy file of token ids in which documents, each with its end token, follow each other.

    The file is mapped into memory, so one file serves every length. As with `data.packing: concatenated`, a row may
    hold parts of several documents.

    Args:
        file: a flat array [N] of an unsigned type, such as uint16.

    Raises:
        UserError: the file is missing or of another kind, has less than one row, or an id is not below `vocab_size`.
    """

    def __init__(self, file: Path | str, sequence_length: int, vocab_size: int) -> None:
        self.file = Path(file)
        try:
            tokens = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a .npy file of token ids ({error})") from None
        if tokens.ndim != 1 or tokens.dtype.kind != "u":
            shape = list(tokens.shape)
            raise UserError(f"{file}: must hold one axis of unsigned token ids, got {tokens.dtype} {shape}")
        if sequence_length < 2 or len(tokens) < sequence_length:
            raise UserError(f"{file}: a row must have 2 to {len(tokens)} tokens, got {sequence_length}")
        if (highest := int(tokens.max())) >= vocab_size:
            raise UserError(
                f"{file}: holds token id {highest} where the teacher's ids are below {vocab_size}; it was made with "
                "another tokenizer"
            )
        super().__init__(tokens, sequence_length, vocab_size)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the content and the length of its rows."""
        return hashlib.sha256(f"{sha256_file(self.file)} {self.sequence_length}".encode()).hexdigest()

"""Documents to rows of one length: concatenated as published, or with boundaries that no token attends across; and the
positions at which rows stand.

# L sequence_length
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Row = dict[str, np.ndarray]


class ConcatenatedPacker:
    """Documents one after another, cut every L tokens; the last, incomplete row is dropped (the paper's way)."""

    def __init__(self, length: int, mask: bool) -> None:
        self.length, self.mask = length, mask
        self.columns: tuple[str, ...] = ("input_ids", "loss_mask") if mask else ("input_ids",)
        self.tokens: list[int] = []
        self.targets: list[bool] = []
        self.dropped = 0

    def add(self, tokens: list[int], targets: list[bool]) -> Iterator[Row]:
        """Rows that this document completes."""
        self.tokens += tokens
        self.targets += targets
        whole = len(self.tokens) // self.length * self.length
        for start in range(0, whole, self.length):
            row = {"input_ids": np.asarray(self.tokens[start : start + self.length])}
            if self.mask:
                row["loss_mask"] = np.asarray(self.targets[start : start + self.length], dtype=np.uint8)
            yield row
        del self.tokens[:whole], self.targets[:whole]

    def flush(self) -> Iterator[Row]:
        """Nothing; counts the tokens of the incomplete row as dropped."""
        self.dropped += len(self.tokens)
        self.tokens, self.targets = [], []
        return iter(())


class DocumentPacker:
    """Whole documents side by side; positions start again at each, and a document longer than L is cut into several.

    The first token of each is no target. A row's free tail is one document of `filler` tokens that are no targets.
    """

    columns: tuple[str, ...] = ("input_ids", "position_ids", "loss_mask")

    def __init__(self, length: int, filler: int) -> None:
        self.length, self.filler = length, filler
        self.tokens: list[int] = []
        self.targets: list[bool] = []
        self.positions: list[int] = []
        self.filled = 0

    def add(self, tokens: list[int], targets: list[bool]) -> Iterator[Row]:
        """Rows that this document completes."""
        for start in range(0, len(tokens), self.length):
            part = tokens[start : start + self.length]
            if len(self.tokens) + len(part) > self.length:
                yield self._row()
            self.tokens += part
            # Nothing before it in the row belongs to the document, so its first token cannot be predicted.
            self.targets += [False, *targets[start + 1 : start + self.length]]
            self.positions += range(len(part))
            if len(self.tokens) == self.length:
                yield self._row()

    def flush(self) -> Iterator[Row]:
        """The last row, filled up."""
        if self.tokens:
            yield self._row()

    def _row(self) -> Row:
        free = self.length - len(self.tokens)
        self.filled += free
        row = {
            "input_ids": np.asarray(self.tokens + [self.filler] * free),
            "position_ids": np.asarray(self.positions + list(range(free))),
            "loss_mask": np.asarray(self.targets + [False] * free, dtype=np.uint8),
        }
        self.tokens, self.targets, self.positions = [], [], []
        return row


class PositionOffset:
    """Every other row at random positions below `below` instead of from 0 on, at the same ones in every run.

    A query and a key are turned by their absolute positions (RoPE) before the feature maps see them. Softmax attention
    sees only how far they are apart, so the teacher's outputs are the same everywhere; maps that have seen no position
    beyond their rows' end do not copy them there. With all rows shifted, those at the beginning of a text lose more
    (docs/recall.md). After position sampling for softmax models (arXiv 2305.16843, 2309.10400).
    """

    def __init__(self, length: int, below: int) -> None:
        self.length, self.starts = length, below - length + 1
        self.random, self.shifted = np.random.default_rng(0), True

    def __call__(self, row: Row) -> Row:
        """The row with `position_ids` that begin at its offset."""
        positions = row.get("position_ids", np.arange(self.length))
        self.shifted = not self.shifted
        return {**row, "position_ids": positions + (self.random.integers(self.starts) if self.shifted else 0)}

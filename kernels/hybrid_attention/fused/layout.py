"""Where a program of a kernel finds its tokens: a table of segments, runs of chunks of one sequence.

Rows of a batch and sequences packed into one row differ only in this table, so every kernel serves both.

# B batch, T tokens of a row, C chunk size, n sequences, M segments
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Columns of the table: row, first token in the row, length, first chunk, chunk after the last, chunk slot of the
# sequence's chunk 0, sequence, 1 where the segment ends its sequence.
COLUMNS = 8


@dataclass(frozen=True)
class Layout:
    """Segments of a batch.

    Attributes:
        table: [M, 8] int32 on the device; a segment that stands for nothing has no chunks.
        first: [n + 1] int32, first segment of each sequence.
        segments: M. `sequences`: n. `slots`: chunks of all sequences together (an upper bound when packed).
    """

    table: Tensor
    first: Tensor
    segments: int
    sequences: int
    slots: int

    @property
    def split(self) -> bool:
        """Whether some sequence may have more than one segment."""
        return self.segments > self.sequences


@dataclass(frozen=True)
class Sequences:
    """Which sequences a call holds: rows of a batch (all of T tokens or of `lengths`), or the packed ones.

    Attributes:
        batch, tokens: B and T of the tensors.
        cu_seqlens: [n + 1] boundaries in the one row, or None. `lengths`: [B] real tokens of each row, or None.
    """

    batch: int
    tokens: int
    device: torch.device
    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def count(self) -> int:
        return self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def token_counts(self) -> Tensor:
        """[n] int64, length of each sequence."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().to(torch.int64)
        if self.lengths is not None:
            return self.lengths.to(torch.int64)
        return torch.full((self.batch,), self.tokens, dtype=torch.int64, device=self.device)

    def layout(self, chunk: int, per_segment: int) -> Layout:
        """The segments of at most `per_segment` chunks of `chunk` tokens; built once per batch shape or boundaries."""
        if self.cu_seqlens is None and self.lengths is None:
            return _whole_rows(self.batch, self.tokens, chunk, per_segment, self.device)
        key = self.lengths if self.cu_seqlens is None else self.cu_seqlens
        cached = _BY_TENSOR.setdefault(key, {})
        name = (self.batch, self.tokens, chunk, per_segment, key._version)  # type: ignore[union-attr]
        if name not in cached:
            cached[name] = self._build(chunk, per_segment)
        return cached[name]

    def _build(self, chunk: int, per_segment: int) -> Layout:
        counts = self.token_counts()
        if self.cu_seqlens is None:
            rows, starts = torch.arange(self.batch, device=self.device), torch.zeros_like(counts)
            row_chunks = -(-self.tokens // chunk)
            slots, segments = self.batch * row_chunks, self.batch * -(-row_chunks // per_segment)
        else:
            rows, starts = torch.zeros_like(counts), self.cu_seqlens[:-1].to(torch.int64)
            # No look at the device: every sequence may add one chunk that is not full.
            slots = self.count + self.tokens // chunk
            segments = self.count + self.tokens // (chunk * per_segment)
        return _segments(rows, starts, counts, chunk, per_segment, segments, slots)


# Keyed by the boundaries' tensor: the layers of a pass share it.
_BY_TENSOR = WeakTensorKeyDictionary()


@lru_cache(maxsize=64)
def _whole_rows(batch: int, tokens: int, chunk: int, per_segment: int, device: torch.device) -> Layout:
    return Sequences(batch, tokens, device)._build(chunk, per_segment)


def _segments(
    rows: Tensor, starts: Tensor, counts: Tensor, chunk: int, per_segment: int, segments: int, slots: int
) -> Layout:
    chunks = (counts + chunk - 1) // chunk
    per_sequence = ((chunks + per_segment - 1) // per_segment).clamp(min=1)
    end = per_sequence.cumsum(0)
    first = end - per_sequence
    index = torch.arange(segments, device=counts.device)
    sequence = torch.searchsorted(end, index, right=True)
    real = sequence < len(counts)
    sequence = sequence.clamp(max=len(counts) - 1)
    c0 = (index - first[sequence]) * per_segment
    c1 = torch.minimum(c0 + per_segment, chunks[sequence])
    last = real & (c1 == chunks[sequence])
    c0, c1 = torch.where(real, c0, 0), torch.where(real, c1, 0)
    slot = chunks.cumsum(0) - chunks
    columns = [rows[sequence], starts[sequence], counts[sequence], c0, c1, slot[sequence], sequence, last]
    table = torch.stack([column.to(torch.int32) for column in columns], 1)
    bounds = torch.cat([first, end[-1:]]).to(torch.int32)
    return Layout(table.contiguous(), bounds, segments, len(counts), slots)

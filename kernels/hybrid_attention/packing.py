"""Sequences packed into one row, and the same as right-padded rows of a batch.

# B batch (1), T tokens, n sequences, H heads, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Column of the packed row for each place of the right-padded batch [n, longest], and the n lengths."""
    lengths = cu_seqlens.diff().to(torch.int64)
    columns = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    index = cu_seqlens[:-1, None].to(torch.int64) + torch.minimum(columns, (lengths - 1).clamp(min=0)[:, None])
    return index, lengths


def unpack_rows(y: Tensor, packed: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded [n, longest, H, D] → packed [1, T, H, D]."""
    real = torch.arange(packed.shape[1], device=y.device)[None, :] < lengths[:, None]
    return y[real][None]

"""The first tokens of each sequence, which softmax attention with a window may see besides (arXiv 2309.17453).

# B batch, T new tokens, s sinks, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The column of a sink that no token has taken yet: after every query.
ABSENT = torch.iinfo(torch.int64).max


@dataclass
class Sinks:
    """Keys and values of each row's first `s` real tokens, in order.

    Attributes:
        k, v: [B, Hk, s, D]. `column`: [B, s] int64, where each stands in its row, padding counted; `ABSENT` if nowhere.
    """

    k: Tensor
    v: Tensor
    column: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Sinks:
        """Sinks with `function` applied to every tensor (all have the batch as first dimension)."""
        return Sinks(function(self.k), function(self.v), function(self.column))


def gather_sinks(older: Sinks | None, k: Tensor, v: Tensor, count: int, seen: int, real: Tensor | None) -> Sinks:
    """The sinks after new tokens, differentiable in `k`, `v` and the older ones.

    Args:
        older: those before, or None. `k`, `v`: [B, Hk, T, D], the new tokens.
        seen: columns before the new ones. `real`: [B, seen + T], False at padding, or None when nothing is padded.
    """
    batch, heads, tokens, _ = k.shape
    if older is None:
        column = torch.full((batch, count), ABSENT, device=k.device)
        empty = [x.new_zeros(batch, heads, count, x.shape[-1]) for x in (k, v)]
        older = Sinks(empty[0], empty[1], column)
    if real is None:
        tokens = min(tokens, max(0, count - seen))
        if tokens == 0:
            return older
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    columns = torch.arange(seen, seen + tokens, device=k.device).expand(batch, -1)
    slot = columns if real is None else (real.cumsum(1) - 1)[:, seen:].masked_fill(~real[:, seen:], count)
    # Tokens that are no sinks go to a slot more, which is cut off.
    slot = slot.clamp(max=count)

    def put(old: Tensor, new: Tensor) -> Tensor:
        index = slot[:, None, :, None].expand_as(new)
        return torch.cat([old, torch.zeros_like(old[:, :, :1])], 2).scatter(2, index, new)[:, :, :count]

    column = torch.cat([older.column, older.column[:, :1]], 1).scatter(1, slot, columns)[:, :count]
    return Sinks(put(older.k, k), put(older.v, v), column)

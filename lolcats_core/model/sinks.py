"""The first tokens of each sequence, which softmax attention with a window may see besides (arXiv 2309.17453).

# B batch, T new tokens, s sinks, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Column of a slot that no token has taken yet: after every query, so that none sees it.
ABSENT = torch.iinfo(torch.int64).max


@dataclass
class Sinks:
    """Keys and values of each row's first `s` real tokens, in order.

    Attributes:
        k, v: [B, Hk, s, D].
        column: [B, s] int64, each sink's column in its row, padding counted; `ABSENT` before there is one.
    """

    k: Tensor
    v: Tensor
    column: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Sinks:
        """Sinks with `function` applied to every tensor (all have the batch as first dimension)."""
        return Sinks(function(self.k), function(self.v), function(self.column))


def gather_sinks(
    cached: Sinks | None, k: Tensor, v: Tensor, count: int, past_length: int, padding_mask: Tensor | None
) -> Sinks:
    """The sinks after new tokens, differentiable in `k`, `v` and the cached ones.

    Args:
        cached: the sinks before the new tokens, or None. `k`, `v`: [B, Hk, T, D], the new tokens.
        past_length: columns before the new ones.
        padding_mask: [B, past_length + T], False at padding, or None when nothing is padded.
    """
    batch, heads, tokens, _ = k.shape
    if cached is None:
        column = torch.full((batch, count), ABSENT, device=k.device)
        empty = [x.new_zeros(batch, heads, count, x.shape[-1]) for x in (k, v)]
        cached = Sinks(empty[0], empty[1], column)
    if padding_mask is None:
        tokens = min(tokens, max(0, count - past_length))
        if tokens == 0:
            return cached
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    columns = torch.arange(past_length, past_length + tokens, device=k.device).expand(batch, -1)
    slot = columns
    if padding_mask is not None:
        slot = (padding_mask.cumsum(1) - 1).masked_fill(~padding_mask, count)[:, past_length:]
    # Tokens that are no sinks go to one slot more, which is cut off.
    slot = slot.clamp(max=count)

    def put(old: Tensor, new: Tensor) -> Tensor:
        index = slot[:, None, :, None].expand_as(new)
        return torch.cat([old, torch.zeros_like(old[:, :, :1])], 2).scatter(2, index, new)[:, :, :count]

    column = torch.cat([cached.column, cached.column[:, :1]], 1).scatter(1, slot, columns)[:, :count]
    return Sinks(put(cached.k, k), put(cached.v, v), column)

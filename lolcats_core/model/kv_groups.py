"""The kv groups of a layer, divided between linear and softmax attention.

A kv group is one key/value head with the query heads that it serves. Group g of a tensor with H heads in n groups is
its heads g H/n … (g + 1) H/n - 1, so one division holds for q, k, v and the outputs alike.

# B batch, T tokens, n kv groups, H heads of a tensor (query heads or kv heads), D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Group = tuple[int, int]  # one of a model's: layer, kv head


@dataclass(frozen=True)
class KVGroups:
    """Which of a layer's `count` kv groups keep softmax attention; the others are linearized."""

    count: int
    softmax: tuple[int, ...] = ()

    @property
    def linear(self) -> tuple[int, ...]:
        return tuple(group for group in range(self.count) if group not in self.softmax)

    def take_linear(self, x: Tensor) -> Tensor:
        """The linearized groups' heads of [B, T, H, D], in order."""
        return self.take(x, self.linear)

    def take(self, x: Tensor, groups: Sequence[int]) -> Tensor:
        """The heads of these groups of [B, T, H, D], in the order given."""
        if tuple(groups) == tuple(range(self.count)):
            return x
        parts = x.chunk(self.count, 2)
        return torch.cat([parts[group] for group in groups], 2)

    def join(self, *parts: tuple[Sequence[int], Tensor]) -> Tensor:
        """Parts of the heads, each with its groups, in the layer's order of heads: the inverse of `take`."""
        by_group: dict[int, Tensor] = {}
        for groups, x in parts:
            by_group |= dict(zip(groups, x.chunk(len(groups), 2), strict=True))
        return torch.cat([by_group[group] for group in range(self.count)], 2)

"""What every form of the hybrid attention takes besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Settings that are not tensors: see `hybrid_attention`."""

    window: str
    window_size: int
    feature_map: str
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Maps:
    """The learnable operands of one layer.

    Attributes:
        w_q: [H, D, F]; `w_k`: [H or Hk, D, F]; `b_q`, `b_k`: [heads, F] or None.
        gamma: [H], weight of the window. `alpha`: [H], weight of the linear part, or None for 1.
        decay: heads of `w_k`, in (0, 1): what a token's linear weight is multiplied by for each later one; None for 1.
    """

    w_q: Tensor
    w_k: Tensor
    gamma: Tensor
    alpha: Tensor | None = None
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    decay: Tensor | None = None

    def linear_factor(self) -> Tensor:
        """[H], alpha or ones."""
        return torch.ones_like(self.gamma) if self.alpha is None else self.alpha

    def tensors(self) -> tuple[Tensor, ...]:
        """All that are given."""
        given = (self.w_q, self.w_k, self.gamma, self.alpha, self.b_q, self.b_k, self.decay)
        return tuple(x for x in given if x is not None)

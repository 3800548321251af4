"""What every form of the hybrid attention takes besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.feature_maps import FEATURE_MAPS

WINDOWS = ("terraced", "sliding", "none")


@dataclass(frozen=True)
class HybridConfig:
    """Settings that are not tensors: see `hybrid_attention`.

    Raises:
        ValueError: a name is unknown or the window's size is no size.
    """

    scale: float
    softcap: float | None = None
    window: str = "terraced"
    window_size: int = 64
    feature_map: str = "hedgehog"

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"`window` must be one of {', '.join(WINDOWS)}, got {self.window!r}")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"`feature_map` must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.window_size < 1:
            raise ValueError(f"`window_size` must be at least 1, got {self.window_size}")


@dataclass(frozen=True)
class HybridWeights:
    """The learnable operands of one layer.

    Attributes:
        w_q: [H, D, F]; `w_k`: [H or Hk, D, F].
        window_factor: [H], gamma. `linear_factor`: [H], weight of the linear part, or None for 1.
        b_q, b_k: [heads of the map, F] or None.
        decay: heads of `w_k`, in (0, 1): what a token's linear weight is multiplied by for each later one; None for 1.
    """

    w_q: Tensor
    w_k: Tensor
    window_factor: Tensor
    linear_factor: Tensor | None = None
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    decay: Tensor | None = None

    def linear_factor_or_ones(self) -> Tensor:
        """[H]."""
        return torch.ones_like(self.window_factor) if self.linear_factor is None else self.linear_factor

    def tensors(self) -> tuple[Tensor, ...]:
        """All that are given."""
        return tuple(x for x in vars(self).values() if x is not None)

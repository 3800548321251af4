"""What every form of the hybrid attention takes besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.feature_maps import FEATURE_MAPS
from lolcats_kernels.hybrid_attention.mixture import ShareWeights

WINDOWS = ("terraced", "sliding", "none")
# Of tokens that see each other in both directions (`bidirectional`).
BIDIRECTIONAL_WINDOWS = ("tiled", "none")


@dataclass(frozen=True)
class HybridConfig:
    """Settings that are not tensors: see `hybrid_attention`.

    Attributes:
        window_sinks: first tokens of the sequence that the softmax part sees besides its window; the linear part does
            not (arXiv 2309.17453).
        rotary_interleaved: how pairs of dims stand that `HybridWeights.frequencies` turn (`mixture.unrotate`).

    Raises:
        ValueError: a name is unknown, or a size is none.
    """

    scale: float
    softcap: float | None = None
    window: str = "terraced"
    window_size: int = 64
    feature_map: str = "hedgehog"
    window_sinks: int = 0
    rotary_interleaved: bool = False

    def __post_init__(self) -> None:
        known = dict.fromkeys((*WINDOWS, *BIDIRECTIONAL_WINDOWS))
        if self.window not in known:
            raise ValueError(f"`window` must be one of {', '.join(known)}, got {self.window!r}")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"`feature_map` must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.window_size < 1:
            raise ValueError(f"`window_size` must be at least 1, got {self.window_size}")
        most = 0 if self.window == "none" else self.window_size
        if not 0 <= self.window_sinks <= most:
            raise ValueError(
                f"`window_sinks` must be from 0 to {most} with window {self.window} of {self.window_size},"
                f" got {self.window_sinks}"
            )


@dataclass(frozen=True)
class HybridWeights:
    """The learnable operands of one layer.

    Attributes:
        w_q: [H, D, F]; `w_k`: [H or Hk, D, F].
        window_factor: [H], gamma. `linear_factor`: [H], weight of the linear part, or None for 1.
        b_q, b_k: [heads of the map, F] or None.
        decay: heads of `w_k`, in (0, 1): what a token's linear weight is multiplied by for each later one; None for 1.
        share: how window and linear part are mixed (`mixture`), in the place of the two factors; the window is
            terraced then. None: one sum.
        frequencies: [P], what the rotary embedding turned q and k by, for features of unrotated ones; None: rotated.
    """

    w_q: Tensor
    w_k: Tensor
    window_factor: Tensor
    linear_factor: Tensor | None = None
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    decay: Tensor | None = None
    share: ShareWeights | None = None
    frequencies: Tensor | None = None

    def linear_factor_or_ones(self) -> Tensor:
        """[H]."""
        return torch.ones_like(self.window_factor) if self.linear_factor is None else self.linear_factor

    def tensors(self) -> tuple[Tensor, ...]:
        """All that are given."""
        own = (x for x in vars(self).values() if isinstance(x, Tensor))
        return (*own, *(vars(self.share).values() if self.share is not None else ()))

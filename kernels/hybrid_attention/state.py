"""What decoding carries from token to token: constant in the length of the sequence.

# B batch, H query heads, Hk key/value heads, Hs heads of the state (H or Hk), D head dim, E features, C window
# R slots of the ring: 2C terraced, C sliding, 0 none; s sinks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class HybridState:
    """State of the hybrid attention after `length` tokens of each sequence.

    Attributes:
        s: [B, Hs, E, D], sum of phi(k) v^T over folded tokens; float32 (float64 for float64 inputs). bf16 stagnates.
            With a decay d, token j of f folded ones stands in it with the factor d^(f - j).
        z: [B, Hs, E], sum of phi(k) over the same tokens.
        ring_k, ring_v: [B, R, Hk, D], window tokens; the token at position p stands in slot p mod R.
        length: [B] int64, tokens seen by each sequence.
        sink_k, sink_v: [B, s, Hk, D], the first tokens (`window_sinks`), as far as they are there; never folded. None
            without sinks.
    """

    s: Tensor
    z: Tensor
    ring_k: Tensor
    ring_v: Tensor
    length: Tensor
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> HybridState:
        """A state with `function` applied to every tensor (all have the batch as first dimension)."""
        mapped: Any = (None if x is None else function(x) for x in vars(self).values())
        return HybridState(*mapped)

    def tensors(self) -> list[Tensor]:
        """All that are there."""
        return [x for x in vars(self).values() if x is not None]


def ring_slots(window: str, window_size: int) -> int:
    """Slots R of the ring."""
    return {"terraced": 2 * window_size, "sliding": window_size, "none": 0}[window]


def folded_tokens(length: Tensor, window: str, window_size: int) -> Tensor:
    """How many of a sequence's first `length` tokens are in S and z: those outside the window of the last of them."""
    if window == "terraced":
        return window_size * ((length - 1).div(window_size, rounding_mode="floor") - 1).clamp(min=0)
    if window == "sliding":
        return (length - window_size).clamp(min=0)
    return length


def fill_ring(x: Tensor, first: Tensor, length: Tensor, window: str, window_size: int, dtype: torch.dtype) -> Tensor:
    """Ring [B, R, Hk, D] of sequences of `length` tokens; zeros in slots that hold none.

    Args:
        x: [B, T, Hk, D], the token at position `first` + i in column i; `first`, `length`: [B].
    """
    slots = ring_slots(window, window_size)
    if not slots:
        return x.new_zeros(x.shape[0], 0, *x.shape[2:], dtype=dtype)
    slot = torch.arange(slots, device=x.device)[None, :]
    # The newest position of each slot.
    position = length[:, None] - 1 - (length[:, None] - 1 - slot) % slots
    held = position >= folded_tokens(length, window, window_size)[:, None]
    column = (position - first[:, None]).clamp(0, x.shape[1] - 1)
    ring = x[torch.arange(x.shape[0], device=x.device)[:, None], column].to(dtype)
    return ring.masked_fill(~held[..., None, None], 0)


def empty_state(
    batch: int,
    state_heads: int,
    features: int,
    key_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    window: str,
    window_size: int,
    dtype: torch.dtype,
    device: torch.device,
    window_sinks: int = 0,
) -> HybridState:
    """The state before the first token. `dtype` is the ring's; S and z are at least float32."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    slots = ring_slots(window, window_size)

    def tokens(count: int, dim: int) -> Tensor:
        return torch.zeros(batch, count, key_heads, dim, dtype=dtype, device=device)

    return HybridState(
        s=torch.zeros(batch, state_heads, features, value_dim, dtype=accumulate, device=device),
        z=torch.zeros(batch, state_heads, features, dtype=accumulate, device=device),
        ring_k=tokens(slots, head_dim),
        ring_v=tokens(slots, value_dim),
        length=torch.zeros(batch, dtype=torch.int64, device=device),
        sink_k=tokens(window_sinks, head_dim) if window_sinks else None,
        sink_v=tokens(window_sinks, value_dim) if window_sinks else None,
    )

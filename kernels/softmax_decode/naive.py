"""The step in plain PyTorch: the definition, and what runs without a GPU.

# B batch, H query heads, Hk key/value heads, D head dim, C slots of the room, s sinks
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_decode_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    *,
    scale: float,
    softcap: float | None,
    real: Tensor | None,
    sinks: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Arguments and result of `softmax_decode_`, in float32 or, if q has it, float64."""
    slots = keys.shape[2]
    slot = newest % slots
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, v)
    # Slots that no token has taken yet: those after the newest in a room that has not gone round.
    seen = (torch.arange(slots, device=q.device) <= newest).expand(q.shape[0], -1)
    if real is not None:
        real.index_fill_(1, slot, True)
        seen = seen & real
    if sinks is not None:
        # What is still in the room is seen there.
        seen = torch.cat([sinks[2] <= newest - slots, seen], 1)
        keys, values = torch.cat([sinks[0], keys], 2), torch.cat([sinks[1], values], 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide).unflatten(1, (keys.shape[1], -1))[:, :, :, 0] @ keys.to(wide).mT * scale  # [B, Hk, H/Hk, C]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (weights @ values.to(wide)).flatten(1, 2)[:, None].to(q.dtype)

"""The step in plain PyTorch: the definition, and what runs without a GPU.

# B batch, H query heads, Hk key/value heads, D head dim, C slots
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats_kernels.softmax_decode.step import DecodeStep


def softmax_decode_naive(step: DecodeStep) -> Tensor:
    """[B, 1, H, D] as `softmax_decode_`, computed in float32 or, if q has it, float64."""
    q, keys, values, newest = step.q, step.keys, step.values, step.newest
    slots = keys.shape[2]
    slot = newest % slots
    keys.index_copy_(2, slot, step.k)
    values.index_copy_(2, slot, step.v)
    # Slots after the newest are free in storage that has not gone round.
    seen = (torch.arange(slots, device=q.device) <= newest).expand(q.shape[0], -1)
    if step.padding_mask is not None:
        step.padding_mask.index_fill_(1, slot, True)
        seen = seen & step.padding_mask
    if step.sinks is not None:
        # A sink that is still in the storage is seen there.
        sink_k, sink_v, column = step.sinks
        seen = torch.cat([column <= newest - slots, seen], 1)
        keys, values = torch.cat([sink_k, keys], 2), torch.cat([sink_v, values], 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))[:, :, :, 0]  # [B, Hk, H/Hk, D]
    scores = grouped @ keys.to(wide).mT * step.scale  # [B, Hk, H/Hk, C]
    if step.softcap is not None:
        scores = step.softcap * (scores / step.softcap).tanh()
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (weights @ values.to(wide)).flatten(1, 2)[:, None].to(q.dtype)

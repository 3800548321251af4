"""The operands of one decoding step of softmax attention.

# B batch, H query heads, Hk key/value heads, D head dim, C slots, s sinks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeStep:
    """A new token of each sequence, and static storage in which column c of a row lies in slot c mod C.

    Storage that has gone round holds the C newest columns, the new one included; any other holds all of them.

    Attributes:
        q: [B, H, 1, D]; `k`, `v`: [B, Hk, 1, D]; of the new tokens, none of which is padding.
        keys, values: [B, Hk, C, D], dense, finite also where no token is yet; written in one slot.
        newest: [1] int64 on the device, the new tokens' column: how many are before them, padding counted.
        scale: of the scores. `softcap`: their bound, cap tanh(score / cap) (Gemma 2), or None.
        padding_mask: [B, C] bool, dense, False at padding; written in one slot. None when nothing is padded.
        sinks: keys and values [B, Hk, s, D] and columns [B, s] int64 of the first tokens, dense, which are seen where
            they have left the storage (arXiv 2309.17453), or None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    newest: Tensor
    scale: float
    softcap: float | None = None
    padding_mask: Tensor | None = None
    sinks: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        q, k, v, keys, values, mask = self.q, self.k, self.v, self.keys, self.values, self.padding_mask
        one_token = q.dim() == 4 and q.shape[2] == 1 and k.shape == v.shape and k.shape[2:] == q.shape[2:]
        if not one_token or q.shape[1] % k.shape[1]:
            raise ValueError(
                "q must be [B, H, 1, D] and k, v [B, Hk, 1, D] with H a multiple of Hk,"
                f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if keys.shape != values.shape or (*keys.shape[:2], keys.shape[3]) != (*k.shape[:2], k.shape[3]):
            raise ValueError(
                f"keys and values must be [B, Hk, C, D] for k {tuple(k.shape)}, got {tuple(keys.shape)} and"
                f" {tuple(values.shape)}"
            )
        if len(dtypes := {x.dtype for x in (q, k, v, keys, values, *(self.sinks or ())[:2])}) > 1:
            raise ValueError(
                f"q, k, v, keys, values and sinks must have one dtype, got {', '.join(sorted(map(str, dtypes)))}"
            )
        if mask is not None and (mask.shape != (q.shape[0], keys.shape[2]) or mask.dtype != torch.bool):
            raise ValueError(
                f"`padding_mask` must be bool [B, C] = [{q.shape[0]}, {keys.shape[2]}],"
                f" got {mask.dtype} {tuple(mask.shape)}"
            )
        if not all(x.is_contiguous() for x in (keys, values, *(self.sinks or ()), *([] if mask is None else [mask]))):
            raise ValueError(
                "keys, values, `padding_mask` and sinks must be dense, since their addresses are those of every later"
                " step"
            )

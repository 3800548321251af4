"""Softmax attention of one new token of each sequence over a room: checks and the choice of form.

# B batch, H query heads, Hk key/value heads, D head dim, C slots of the room, s sinks
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lolcats_kernels.softmax_decode.naive import softmax_decode_naive

BACKENDS = ("auto", "triton", "naive")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def softmax_decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    real: Tensor | None = None,
    sinks: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of a new token over a room, in which column c of a row lies in slot c mod C; the token joins the room.

    A room that has gone round holds the C newest columns, the new one included; any other holds all of them. Nothing
    depends on the host, so a step can be captured in a CUDA graph and replayed at every position.

    Args:
        q: [B, H, 1, D]; `k`, `v`: [B, Hk, 1, D]; of the new tokens, none of which is padding.
        keys, values: [B, Hk, C, D], dense, finite also where no token is yet; written in one slot.
        newest: [1] int64 on the device, the new tokens' column: how many are before them, padding counted.
        scale: of the scores. `softcap`: their bound, cap tanh(score / cap) (Gemma 2).
        real: [B, C] bool, dense, False where a slot holds padding; written in one slot. None when nothing is padded.
        sinks: keys and values [B, Hk, s, D] and columns [B, s] int64 of the first tokens, dense, which are seen where
            they have left the room (arXiv 2309.17453).
        backend: "triton", "naive" (PyTorch, any dtype), or "auto": the kernels on a GPU in the dtypes they take.

    Returns:
        [B, 1, H, D] in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend, or one that does not take this call.
    """
    if q.dim() != 4 or q.shape[2] != 1 or k.shape != v.shape or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be [B, H, 1, D] and k, v [B, Hk, 1, D] with H a multiple of Hk,"
            f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if keys.shape != values.shape or (*keys.shape[:2], keys.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            f"keys and values must be [B, Hk, C, D] for k {tuple(k.shape)}, got {tuple(keys.shape)} and"
            f" {tuple(values.shape)}"
        )
    if len(dtypes := {x.dtype for x in (q, k, v, keys, values, *(sinks or ())[:2])}) > 1:
        raise ValueError(
            f"q, k, v, keys, values and sinks must have one dtype, got {', '.join(sorted(map(str, dtypes)))}"
        )
    if real is not None and (real.shape != (q.shape[0], keys.shape[2]) or real.dtype != torch.bool):
        raise ValueError(
            f"`real` must be bool [B, C] = [{q.shape[0]}, {keys.shape[2]}], got {real.dtype} {tuple(real.shape)}"
        )
    if not all(x.is_contiguous() for x in (keys, values, *(sinks or ()), *([] if real is None else [real]))):
        raise ValueError(
            "keys, values, `real` and sinks must be dense, since their addresses are those of every later step"
        )
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "real": real, "sinks": sinks}
    if backend == "naive" or (backend == "auto" and not (q.is_cuda and q.dtype in DTYPES)):
        return softmax_decode_naive(q, k, v, keys, values, newest, **options)
    if q.dtype not in DTYPES:
        raise ValueError(f"`backend` triton takes float16, bfloat16 and float32, got {q.dtype}")
    # Triton is imported only where it runs: it is not everywhere.
    from lolcats_kernels.softmax_decode import fused

    return fused.softmax_decode(q, k, v, keys, values, newest, **options)

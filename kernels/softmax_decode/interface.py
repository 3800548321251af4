"""Softmax attention of one new token of each sequence over static keys and values: checks and the choice of form.

# B batch, H query heads, Hk key/value heads, D head dim, C slots, s sinks
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats_kernels.softmax_decode.naive import softmax_decode_naive
from lolcats_kernels.softmax_decode.step import DecodeStep

BACKENDS = ("auto", "triton", "naive")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def softmax_decode_(step: DecodeStep, backend: str = "auto") -> Tensor:
    """Attention of a new token over the keys and values before it and its own, which are stored.

    Nothing depends on the host, so a step can be captured in a CUDA graph and replayed at every position.

    Args:
        backend: "triton", "naive" (PyTorch, any dtype), or "auto": the kernels on a GPU in the dtypes they take.

    Returns:
        [B, 1, H, D] in the dtype of `step.q`.

    Raises:
        ValueError: an unknown backend, or one that does not take this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    q = step.q
    if backend == "naive" or (backend == "auto" and not (q.is_cuda and q.dtype in DTYPES)):
        return softmax_decode_naive(step)
    if q.dtype not in DTYPES:
        raise ValueError(f"`backend` triton takes float16, bfloat16 and float32, got {q.dtype}")
    # Triton is imported only where it runs: it is not everywhere.
    from lolcats_kernels.softmax_decode import fused

    return fused.softmax_decode(step)

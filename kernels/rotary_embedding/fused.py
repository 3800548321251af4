"""Rotary embeddings (arXiv 2104.09864, half-split form) by one Triton kernel instead of ten elementwise ones.

Every product is rounded to the dtype of its operands, as PyTorch's operators round theirs: in half precision the
result is the families' own, bit for bit.

# B batch, T tokens, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(X, Y, x_head, y_head, c1, c2, s1, s2, HEADS: tl.constexpr, D: tl.constexpr, INVERSE: tl.constexpr):
    """One token's heads [HEADS, D], from X with a stride of `x_head` to Y with one of `y_head`."""
    i = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    j = tl.arange(0, triton.next_power_of_2(D // 2))[None, :]
    inside = (i < HEADS) & (j < D // 2)
    x1 = tl.load(X + i * x_head + j, mask=inside, other=0.0)
    x2 = tl.load(X + i * x_head + j + D // 2, mask=inside, other=0.0)
    kind: tl.constexpr = X.dtype.element_ty
    wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
    if INVERSE:
        y1 = (wide1 * c1).to(kind).to(tl.float32) + (wide2 * s2).to(kind).to(tl.float32)
        y2 = (wide2 * c2).to(kind).to(tl.float32) - (wide1 * s1).to(kind).to(tl.float32)
    else:
        y1 = (wide1 * c1).to(kind).to(tl.float32) - (wide2 * s1).to(kind).to(tl.float32)
        y2 = (wide2 * c2).to(kind).to(tl.float32) + (wide1 * s2).to(kind).to(tl.float32)
    tl.store(Y + i * y_head + j, y1.to(kind), mask=inside)
    tl.store(Y + i * y_head + j + D // 2, y2.to(kind), mask=inside)


@triton.jit
def rotary_kernel(
    Q, K, COS, SIN, Q_OUT, K_OUT, T, q_strides, k_strides, cos_strides, sin_strides,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Q_OUT [B, T, H, D] and K_OUT [B, T, Hk, D] of one token; strides are of batch, head and token."""
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    j = tl.arange(0, triton.next_power_of_2(D // 2))[None, :]
    inside = j < D // 2
    cos = COS + b * cos_strides[0] + t * cos_strides[1] + j
    sin = SIN + b * sin_strides[0] + t * sin_strides[1] + j
    c1 = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + D // 2, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + D // 2, mask=inside, other=0.0).to(tl.float32)
    q = Q + b * q_strides[0] + t * q_strides[2]
    k = K + b * k_strides[0] + t * k_strides[2]
    _rotate(q, Q_OUT + token * H * D, q_strides[1], D, c1, c2, s1, s2, H, D, INVERSE)
    _rotate(k, K_OUT + token * HK * D, k_strides[1], D, c1, c2, s1, s2, HK, D, INVERSE)


@torch.library.custom_op("lolcats::rotary_embedding", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (x.expand(batch, tokens, dim) for x in (cos, sin))
    outputs = [torch.empty(batch, tokens, x.shape[1], dim, dtype=x.dtype, device=x.device) for x in (q, k)]
    rotary_kernel[(batch * tokens,)](
        q, k, cos, sin, *outputs, tokens, q.stride()[:3], k.stride()[:3], cos.stride()[:2], sin.stride()[:2],
        H=heads, HK=k.shape[1], D=dim, INVERSE=inverse, num_warps=4 if heads * dim <= 8192 else 8,
        enable_fp_fusion=False,  # a fused multiply-add would not round the product
    )  # fmt: skip
    return outputs[0], outputs[1]


@_rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])

    return like(q), like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = _rotary(dq.transpose(1, 2), dk.transpose(1, 2), *ctx.saved_tensors, True)
    return dq.transpose(1, 2), dk.transpose(1, 2), None, None, None


_rotary.register_autograd(_differentiate, setup_context=_save)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with the first half of each head turned against the second by its position's angles.

    Args:
        q: [B, H, T, D]; `k`: [B, Hk, T, D], in any layout whose last dimension is dense.
        cos: [B or 1, T, D]; `sin`: the same; in the dtype of `q` and without gradient.

    Returns:
        The same shapes and dtypes; in memory [B, T, heads, D].
    """
    q, k = _rotary(q, k, cos, sin, False)
    return q.transpose(1, 2), k.transpose(1, 2)

"""Quadratic form of the hybrid attention: the definition, for tests and for attention weights by block.

# B batch, T queries, N keys, H query heads, Hk key/value heads, D head dim, F columns of a map, C window
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map

# Keeps pure linear attention from dividing by zero: without a window its denominator has no gamma (docs/method.md, 3).
NO_WINDOW_EPSILON = 1e-12


def window_mask(window: str, queries: Tensor, keys: Tensor, window_size: int) -> Tensor:
    """True where key position j lies in the softmax window of query position i; the mask logic of every form.

    Args:
        queries, keys: integer positions counted from the start of the sequence, broadcastable against each other.
    """
    if window == "terraced":
        return (keys <= queries) & (keys // window_size >= queries // window_size - 1)
    if window == "sliding":
        return (keys <= queries) & (keys > queries - window_size)
    if window == "none":
        return torch.zeros(torch.broadcast_shapes(queries.shape, keys.shape), dtype=torch.bool, device=queries.device)
    raise ValueError(f"`window` must be one of terraced, sliding, none, got {window!r}")


def window_scores(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores of the softmax window from q k^T; `softcap` bounds them by softcap tanh(s / softcap) (Gemma 2)."""
    scores = products * scale
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def hybrid_weights(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = "terraced",
    window_size: int = 64,
    feature_map: str = "hedgehog",
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    first_query: int = 0,
) -> Tensor:
    """Normalised attention weights of queries `first_query` … `first_query + T - 1` over keys 0 … N - 1.

    Args:
        q: [B, T, H, D]; `k`: [B, N, Hk, D]; maps and factors as in `hybrid_attention`.

    Returns:
        [B, H, T, N] in the dtype of `q`; rows sum to 1.
    """
    heads, key_heads = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    repeated = k.repeat_interleave(heads // key_heads, 1)
    phi_q = apply_feature_map(q, w_q, feature_map, b_q)
    phi_k = apply_feature_map(repeated if w_k.shape[0] == heads else k, w_k, feature_map, b_k)
    phi_k = phi_k.repeat_interleave(heads // phi_k.shape[1], 1)

    queries = torch.arange(first_query, first_query + q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None, :]
    inside = window_mask(window, queries, keys, window_size)
    past = (keys <= queries) & ~inside
    alpha = torch.ones_like(window_factor) if linear_factor is None else linear_factor
    similar = phi_q @ phi_k.mT
    if decay is not None:
        distance = (queries - keys).clamp(min=0)
        similar = similar * (decay.to(q.dtype)[:, None, None] ** distance).repeat_interleave(heads // len(decay), 0)
    weights = alpha.to(q.dtype)[:, None, None] * similar.masked_fill(~past, 0)
    if window == "none":
        return weights / (weights.sum(-1, keepdim=True) + NO_WINDOW_EPSILON)
    scores = window_scores(q @ repeated.mT, scale, softcap).masked_fill(~inside, float("-inf"))
    weights = weights + window_factor.to(q.dtype)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def hybrid_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, window_factor: Tensor, **options: object
) -> Tensor:
    """y [B, T, H, D] by T x T weights, in the dtype of the inputs (float64 in tests); arguments of `hybrid_weights`."""
    weights = hybrid_weights(q, k, w_q, w_k, window_factor, **options)  # type: ignore[arg-type]
    values = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
    return (weights @ values).transpose(1, 2)

"""Quadratic form of the hybrid attention: the definition, for tests and for attention weights by block.

# B batch, T queries, N keys, H query heads, Hk key/value heads, D head dim, F columns of a map, C window
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import WINDOWS, HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map
from lolcats_kernels.hybrid_attention.mixture import linear_share, unrotate

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
    raise ValueError(f"`window` must be one of {', '.join(WINDOWS)}, got {window!r}")


def window_scores(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores of the softmax window from q k^T; `softcap` bounds them by softcap tanh(s / softcap) (Gemma 2)."""
    scores = products * scale
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def attention_weights(
    q: Tensor, k: Tensor, weights: HybridWeights, config: HybridConfig, first_query: int = 0
) -> Tensor:
    """Normalised attention weights of queries `first_query` … `first_query + T - 1` over keys 0 … N - 1.

    Args:
        q: [B, T, H, D]; `k`: [B, N, Hk, D].

    Returns:
        [B, H, T, N] in the dtype of `q`; rows sum to 1.
    """
    heads, key_heads = q.shape[2], k.shape[2]
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    repeated = k.repeat_interleave(heads // key_heads, 1)
    one_map_per_query_head = weights.w_k.shape[0] == heads
    queries = torch.arange(first_query, first_query + q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None, :]
    turn = weights.frequencies, config.rotary_interleaved
    q_plain = unrotate(q, queries[:, 0], *turn)
    k_plain = unrotate(repeated if one_map_per_query_head else k, keys[0], *turn)
    phi_q = apply_feature_map(q_plain, weights.w_q, config.feature_map, weights.b_q)
    phi_k = apply_feature_map(k_plain, weights.w_k, config.feature_map, weights.b_k)
    phi_k = phi_k.repeat_interleave(heads // phi_k.shape[1], 1)

    inside = window_mask(config.window, queries, keys, config.window_size)
    inside |= (keys < config.window_sinks) & (keys <= queries)
    past = (keys <= queries) & ~inside
    similar = phi_q @ phi_k.mT
    remains = None
    if weights.decay is not None:
        distance = (queries - keys).clamp(min=0)
        by_map = weights.decay.to(q.dtype)[:, None, None] ** distance
        remains = by_map.repeat_interleave(heads // len(weights.decay), 0)
        similar = similar * remains
    if weights.share is not None:
        scores = window_scores(q @ repeated.mT, config.scale, config.softcap).masked_fill(~inside, float("-inf"))
        linear = similar.masked_fill(~past, 0)
        denominator = linear.sum(-1)
        weighed = past.to(q.dtype) if remains is None else remains.masked_fill(~past, 0)
        count = weighed.sum(-1).clamp(min=torch.finfo(q.dtype).tiny).log()
        r = linear_share(
            weights.share.view(heads, 1), q_plain, denominator, count, count, scores.logsumexp(-1), past.any(-1)
        )[..., None]
        return (1 - r) * scores.softmax(-1) + r * linear / denominator.clamp(min=NO_WINDOW_EPSILON)[..., None]
    gamma, alpha = (x.to(q.dtype)[:, None, None] for x in (weights.window_factor, weights.linear_factor_or_ones()))
    linear = alpha * similar.masked_fill(~past, 0)
    if config.window == "none":
        return linear / (linear.sum(-1, keepdim=True) + NO_WINDOW_EPSILON)
    scores = window_scores(q @ repeated.mT, config.scale, config.softcap).masked_fill(~inside, float("-inf"))
    total = linear + gamma * (scores - scores.amax(-1, keepdim=True)).exp()
    return total / total.sum(-1, keepdim=True)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig) -> Tensor:
    """y [B, T, H, D] by T x T weights, in the dtype of the inputs (float64 in tests)."""
    values = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
    return (attention_weights(q, k, weights, config) @ values).transpose(1, 2)

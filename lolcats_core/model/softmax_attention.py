"""Softmax attention of a linearized model: the layers and kv groups that keep it, their windows and their sinks.

# B batch, T new tokens, S tokens so far, s sinks, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_core.model.decoding.cache import KeptLayer
from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.sinks import Sinks, gather_sinks
from lolcats_kernels.hybrid_attention import window_scores
from lolcats_kernels.hybrid_attention.packing import packed_index, unpack_rows

# Queries per block where softmax attention needs a mask in memory.
SOFTMAX_BLOCK = 512


@dataclass(frozen=True)
class SoftmaxWindow:
    """What kept softmax attention sees: the `size` newest tokens (None: all) and the first `sinks` of the row."""

    size: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class KeptGroups:
    """The kv groups of a layer that keep softmax attention, by what they see; each part has a cache of its own.

    Attributes:
        groups: all of the layer's. `parts`: kv groups by their window, in order; together they are `groups.softmax`.
    """

    groups: KVGroups
    parts: dict[SoftmaxWindow, tuple[int, ...]]

    @staticmethod
    def of(config: Any, layer: int) -> KeptGroups:
        """Of a layer of a linearized model's config. A local layer stays as it is."""
        settings, count = LinearizeConfig.from_dict(config.linearize), kv_heads(config)
        if layer in local_layers(config):
            return KeptGroups(KVGroups(count, tuple(range(count))), {SoftmaxWindow(): tuple(range(count))})
        found = settings.softmax_parts(layer, count)
        parts = {SoftmaxWindow(size, settings.softmax_sinks): members for size, members in found.items()}
        return KeptGroups(KVGroups(count, tuple(sorted(g for members in parts.values() for g in members))), parts)


def kept_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: HybridContext,
    scores: Scores,
    window: SoftmaxWindow,
    sliding_window: int | None = None,
    layer: KeptLayer | None = None,
) -> Tensor:
    """Softmax attention of kept layers and heads within `window`; arguments and result of `softmax_attention`.

    Args:
        sliding_window: the teacher's own, which `window` replaces where it has a size.
        layer: the cache that `k` and `v` come from, whose sinks are replaced. While it takes a static step, they are
            the new token's alone.
    """
    if layer is not None and layer.in_static_step:
        return layer.step(q, k, v, scores)
    if window.size is None or not window.sinks:
        return softmax_attention(q, k, v, context, scores, sliding_window if window.size is None else window.size)
    if context.cu_seqlens is not None and q.shape[2] > window.size:
        return _packed_sink_attention(q, k, v, context, context.cu_seqlens, scores, window)
    return _sink_attention(q, k, v, context, scores, window, layer)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: HybridContext,
    scores: Scores,
    sliding_window: int | None,
    sinks: Sinks | None = None,
) -> Tensor:
    """The teacher's attention: q [B, H, T, D], k and v [B, Hk, S, D] → [B, T, H, D].

    Memory is linear in S: where no fused kernel computes the scores without a mask, queries go by blocks.

    Args:
        sliding_window: newest tokens that a query sees. `sinks`: what it sees of the tokens before those.
    """
    queries, keys = q.shape[2], k.shape[2]
    window = keys if sliding_window is None else min(sliding_window, keys)
    unmasked = context.padding_mask is None and context.document_ids is None and window == keys and sinks is None
    if unmasked and scores.softcap is None and queries in (1, keys):
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scores.scale, enable_gqa=grouped)
        return y.transpose(1, 2)
    parts = []
    for start in range(keys - queries, keys, SOFTMAX_BLOCK):
        rows = range(start, min(start + SOFTMAX_BLOCK, keys))
        seen = range(max(0, rows.start - window + 1), rows.stop)
        mask = _softmax_mask(context, rows, seen, keys, window, q.device)
        q_rows = q[:, :, rows.start - keys + queries : rows.stop - keys + queries]
        k_seen, v_seen = (x[:, :, seen.start : seen.stop] for x in (k, v))
        if sinks is not None:
            newest = context.past_length + queries - 1
            oldest = torch.arange(rows.start, rows.stop, device=q.device) + (newest - keys + 1) - window + 1
            before = (sinks.column[:, None, None, :] < oldest[:, None]).expand(-1, 1, -1, -1)
            mask = torch.cat([before, mask.expand(len(before), -1, -1, -1)], -1)
            k_seen, v_seen = torch.cat([sinks.k, k_seen], 2), torch.cat([sinks.v, v_seen], 2)
        parts.append(_masked_attention(q_rows, k_seen, v_seen, mask, scores))
    return torch.cat(parts, 2).transpose(1, 2)


def _sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: HybridContext,
    scores: Scores,
    window: SoftmaxWindow,
    layer: KeptLayer | None = None,
) -> Tensor:
    """Attention to a window and the row's first tokens, each row being one sequence; replaces the sinks of `layer`."""
    assert window.size is not None
    sinks, leaves_window = None, context.past_length + q.shape[2] > window.size
    if layer is not None or leaves_window:
        new_k, new_v = (x[:, :, x.shape[2] - q.shape[2] :] for x in (k, v))
        cached = None if layer is None else layer.sinks
        sinks = gather_sinks(cached, new_k, new_v, window.sinks, context.past_length, context.padding_mask)
    if layer is not None:
        layer.sinks = sinks
    return softmax_attention(q, k, v, context, scores, window.size, sinks if leaves_window else None)


def _packed_sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: HybridContext,
    cu_seqlens: Tensor,
    scores: Scores,
    window: SoftmaxWindow,
) -> Tensor:
    """`_sink_attention` of packed rows, in which every document has first tokens of its own."""
    batch = q.shape[0]
    index, lengths = packed_index(cu_seqlens)
    q, k, v = (context.to_front(x.transpose(1, 2)).flatten(0, 1)[index].transpose(1, 2) for x in (q, k, v))
    padding_mask = torch.arange(index.shape[1], device=q.device) < lengths[:, None]
    y = _sink_attention(q, k, v, HybridContext(padding_mask=padding_mask), scores, window)
    return context.to_places(unpack_rows(y, index, lengths).view(batch, -1, *y.shape[2:]))


def _softmax_mask(
    context: HybridContext, queries: range, keys: range, cached: int, window: int, device: torch.device
) -> Tensor:
    """[B or 1, 1, queries, keys] bool, True where a query sees a key.

    Both ranges index the newest `cached` tokens; a query sees at most `window` of them, itself included.
    """
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, :]
    allowed = ((key <= query) & (key > query - window))[None]
    if context.document_ids is not None:
        allowed = allowed & (context.document_ids[:, query] == context.document_ids[:, key])
    if context.padding_mask is not None:
        # A padding query sees itself, or its softmax would be over nothing.
        real = context.padding_mask[:, -cached:][:, None, keys.start : keys.stop]
        allowed = (allowed & real) | (key == query)[None]
    return allowed[:, None]


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Softmax attention where `mask` is True; no fused kernel of torch bounds scores (Gemma 2)."""
    if scores.softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=grouped)
    products = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)
    bounded = window_scores(products.float(), scores.scale, scores.softcap)
    weights = bounded.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.to(v.dtype).unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)

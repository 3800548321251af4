"""The attention function of linearized models, behind transformers' attention interface.

transformers projects, normalises and rotates; this function receives q, k, v and what a forward pass needs to know
besides, a `HybridContext` that is prepared once per pass (`prepare_inputs`, a hook before the decoder).

# B batch, T new tokens, S tokens so far, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache, HybridLayer, KeptLayer
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.sinks import Sinks, gather_sinks
from lolcats_kernels.hybrid_attention import hybrid_attention, hybrid_decode_, window_scores
from lolcats_kernels.hybrid_attention.packing import packed_index, unpack_rows

ATTENTION_NAME = "lolcats_hybrid"
# Receives (layer index, maps, q, k, v, softmax output, scores, context); tensors [B, T, heads, D] of linearized heads.
TransferObserver = Callable[[int, FeatureMaps, Tensor, Tensor, Tensor, Tensor, "Scores", "HybridContext"], None]
# Queries per block where softmax attention needs a mask in memory.
SOFTMAX_BLOCK = 512


def look_away(*_: Any) -> None:
    """The observer of a pass that only needs the teacher's outputs."""


@dataclass(frozen=True)
class Reach:
    """What kept softmax attention sees: the `window` newest tokens (None: all) and the first `sinks` of the row."""

    window: int | None = None
    sinks: int = 0


@dataclass
class HybridContext:
    """What the layers of one forward pass share.

    Attributes:
        cache: state to continue and to leave behind, or None.
        real: [B, S] bool, False at padding; None when nothing is padded. `seen`: how many of S are from before.
        document: [B, T] int, number of each token's document in its row; None when every row is one document.
        observer: stage 1: every layer computes its softmax output, shows it here and passes it on (teacher forcing).
    """

    cache: HybridCache | None = None
    real: Tensor | None = None
    document: Tensor | None = None
    observer: TransferObserver | None = None
    seen: int = 0

    @cached_property
    def new_real(self) -> Tensor | None:
        """[B, T], `real` of the new tokens; None when none of them is padding."""
        new = None if self.real is None else self.real[:, self.seen :]
        return None if new is None or bool(new.all()) else new

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """[n + 1] boundaries of the documents in the flattened batch, or None; one tensor for all layers."""
        if self.document is None:
            return None
        rows, tokens = self.document.shape
        starts = torch.ones(rows, tokens, dtype=torch.bool, device=self.document.device)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        first = starts.flatten().nonzero()[:, 0]
        return torch.cat([first, first.new_tensor([rows * tokens])])

    def softmax_mask(self, queries: range, keys: range, held: int, window: int, device: torch.device) -> Tensor:
        """[B or 1, 1, queries, keys] bool, True where softmax attention looks.

        Both ranges are places among the newest `held` tokens; a query sees at most `window` of them, itself included.
        """
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)[None, :]
        allowed = ((key <= query) & (key > query - window))[None]
        if self.document is not None:
            allowed = allowed & (self.document[:, query] == self.document[:, key])
        if self.real is not None:
            # A padding query sees itself, or its softmax would be over nothing.
            real = self.real[:, -held:][:, None, keys.start : keys.stop]
            allowed = (allowed & real) | (key == query)[None]
        return allowed[:, None]


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

    Memory is linear in S: what no fused kernel computes without a mask goes by blocks of queries.

    Args:
        sliding_window: newest tokens that a query sees. `sinks`: what it sees of those before.
    """
    queries, keys = q.shape[2], k.shape[2]
    window = keys if sliding_window is None else min(sliding_window, keys)
    unmasked = context.real is None and context.document is None and window == keys and sinks is None
    if unmasked and scores.softcap is None and queries in (1, keys):
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scores.scale, enable_gqa=grouped)
        return y.transpose(1, 2)
    parts = []
    for start in range(keys - queries, keys, SOFTMAX_BLOCK):
        rows = range(start, min(start + SOFTMAX_BLOCK, keys))
        seen = range(max(0, rows.start - window + 1), rows.stop)
        mask = context.softmax_mask(rows, seen, keys, window, q.device)
        q_rows = q[:, :, rows.start - keys + queries : rows.stop - keys + queries]
        k_seen, v_seen = (x[:, :, seen.start : seen.stop] for x in (k, v))
        if sinks is not None:
            newest = context.seen + queries - 1
            oldest = torch.arange(rows.start, rows.stop, device=q.device) + (newest - keys + 1) - window + 1
            before = (sinks.column[:, None, None, :] < oldest[:, None]).expand(-1, 1, -1, -1)
            mask = torch.cat([before, mask.expand(len(before), -1, -1, -1)], -1)
            k_seen, v_seen = torch.cat([sinks.k, k_seen], 2), torch.cat([sinks.v, v_seen], 2)
        parts.append(_masked_attention(q_rows, k_seen, v_seen, mask, scores))
    return torch.cat(parts, 2).transpose(1, 2)


def kept_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: HybridContext,
    scores: Scores,
    sliding_window: int | None,
    reach: Reach,
    layer: KeptLayer | None,
) -> Tensor:
    """Softmax attention of kept layers and heads within their reach; arguments and result of `softmax_attention`.

    Args:
        layer: the cache that `k` and `v` come from, whose sinks are replaced. In a step inside a room they are the new
            tokens' alone.
    """
    if layer is not None and layer.room is not None and layer.room.stepping:
        return layer.step(q, k, v, scores)
    if reach.window is None:
        return softmax_attention(q, k, v, context, scores, sliding_window)
    beyond = context.seen + q.shape[2] > reach.window
    if not reach.sinks or (layer is None and not beyond):
        return softmax_attention(q, k, v, context, scores, reach.window)
    edges = context.cu_seqlens
    if edges is not None:
        # Every document has first tokens of its own.
        batch = q.shape[0]
        index, lengths = packed_index(edges)
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2) for x in (q, k, v))
        alone = HybridContext(real=torch.arange(index.shape[1], device=q.device) < lengths[:, None])
        y = kept_attention(q, k, v, alone, scores, sliding_window, reach, None)
        return unpack_rows(y, index, lengths).view(batch, -1, *y.shape[2:])
    older = None if layer is None else layer.sinks
    new_k, new_v = (x[:, :, x.shape[2] - q.shape[2] :] for x in (k, v))
    sinks = gather_sinks(older, new_k, new_v, reach.sinks, context.seen, context.real)
    if layer is not None:
        layer.sinks = sinks
    return softmax_attention(q, k, v, context, scores, reach.window, sinks if beyond else None)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Softmax attention where `mask` is True; no fused kernel of torch bounds scores (Gemma 2)."""
    if scores.softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=grouped)
    products = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)
    weights = (
        window_scores(products.float(), scores.scale, scores.softcap).masked_fill(~mask, float("-inf")).softmax(-1)
    )
    return (weights.to(v.dtype).unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)


def hybrid_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    hybrid: HybridContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' attention interface calls it.

    Args:
        query: [B, H, T, D]; `key`, `value`: [B, Hk, T, D] (a layer that keeps softmax whole: [B, Hk, S, D]).

    Returns:
        [B, T, H, D] in the dtype of `query`, and None for the weights, which are never built.
    """
    context = HybridContext() if hybrid is None else hybrid
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    maps = getattr(module, "feature_maps", None)
    held = None if context.cache is None else context.cache.layers[module.layer_idx]
    if maps is None:
        # An observer is shown the teacher, which sees everything.
        reach = module.reach if context.observer is None else Reach()
        kept = cast(KeptLayer | None, held)
        return kept_attention(query, key, value, context, scores, sliding_window, reach, kept), None
    groups: KVGroups = maps.groups
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q_linear, k_linear, v_linear = (groups.take_linear(x) for x in (q, k, v))
    if context.observer is not None:
        y = softmax_attention(query, key, value, context, scores, sliding_window)
        context.observer(module.layer_idx, maps, q_linear, k_linear, v_linear, groups.take_linear(y), scores, context)
        return y, None
    layer = cast(HybridLayer | None, held)
    y = student_attention(maps, q_linear, k_linear, v_linear, scores, context, layer)
    if groups.softmax:
        query, key, value = (groups.take_softmax(x).transpose(1, 2) for x in (q, k, v))
        kept = None if layer is None else layer.softmax
        if kept is not None:
            key, value = kept.update(key, value)
        y = groups.join(y, kept_attention(query, key, value, context, scores, sliding_window, module.reach, kept))
    return y, None


def student_attention(
    maps: FeatureMaps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    context: HybridContext,
    layer: HybridLayer | None = None,
) -> Tensor:
    """Hybrid attention of a layer's linearized heads over padded, packed or continued rows.

    Args:
        q: [B, T, H, D]; `k`, `v`: [B, T, Hk, D]; of the linearized kv groups alone.
        layer: the cache of these heads, whose state is replaced.

    Returns:
        [B, T, H, D] in the dtype of `q`; zero at padding.
    """
    operands, options = maps.operands(scores)
    edges = context.cu_seqlens
    if edges is not None:
        packed = (x.flatten(0, 1)[None] for x in (q, k, v))
        return hybrid_attention(*packed, *operands, **options, cu_seqlens=edges).view(q.shape[0], -1, *q.shape[2:])
    real, order = context.new_real, None
    if real is not None:
        # Real tokens to the front of their row, in their order; padding never enters a chunk or the state.
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        q, k, v = (x.gather(1, order[:, :, None, None].expand_as(x)) for x in (q, k, v))
        options["lengths"] = real.sum(1)
    if layer is None:
        y = hybrid_attention(q, k, v, *operands, **options)
    elif layer.state is not None and q.shape[1] == 1 and order is None and not torch.is_grad_enabled():
        y = hybrid_decode_(q, k, v, *operands, layer.state, **options)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *operands)):
        # No gradient passes through a state, so it is computed apart; the fused kernels then take both calls.
        y = hybrid_attention(q, k, v, *operands, **options, initial_state=layer.state)
        with torch.no_grad():
            _, layer.state = hybrid_attention(
                q, k, v, *operands, **options, initial_state=layer.state, return_state=True
            )
    else:
        y, layer.state = hybrid_attention(q, k, v, *operands, **options, initial_state=layer.state, return_state=True)
    if order is not None and real is not None:
        y = torch.empty_like(y).scatter(1, order[:, :, None, None].expand_as(y), y)
        y = y.masked_fill(~real[:, :, None, None], 0)
    return y


def document_numbers(position_ids: Tensor) -> Tensor | None:
    """[B, T] number of each token's document where positions start again inside a row; None where none does."""
    jumps = position_ids.diff(dim=-1) != 1
    return F.pad(jumps.cumsum(-1), (1, 0)) if bool(jumps.any()) else None


def prepare_inputs(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the decoder: positions, cache and the `HybridContext` of the pass.

    Raises:
        UserError: a mask that is not [B, S], a foreign cache, or packed rows together with a cache.
    """
    if kwargs.get("hybrid") is not None:
        return args, kwargs
    kwargs = dict(kwargs)
    mask, cache, positions = (kwargs.get(name) for name in ("attention_mask", "past_key_values", "position_ids"))
    use_cache = kwargs.get("use_cache")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    if cache is None and use_cache and not decoder.training:
        cache = kwargs["past_key_values"] = HybridCache(decoder.config)
    if cache is not None and not isinstance(cache, HybridCache):
        raise UserError(f"`past_key_values` of a linearized model must be a HybridCache, got {type(cache).__name__}")
    if mask is not None and mask.dim() != 2:
        raise UserError(f"`attention_mask` of a linearized model must be [B, S], got {tuple(mask.shape)}")
    real = None if mask is None or bool(mask.bool().all()) else mask.bool()
    seen = 0 if cache is None else cache.get_seq_length()
    document = None
    if positions is None and real is not None:
        # Features depend on absolute positions, so padding must not count.
        kwargs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)[:, seen:]
    elif positions is not None and real is None and seen == 0 and positions.shape[-1] > 1:
        document = document_numbers(positions)
    if document is not None:
        # Some families give the ids by position.
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        document = document.expand(len(next(x for x in given if x is not None)), -1)
        # Packed documents leave no single state behind.
        kwargs["use_cache"], kwargs["past_key_values"], cache = False, None, None
    kwargs["hybrid"] = HybridContext(cache=cache, real=real, document=document, seen=seen)
    return args, kwargs

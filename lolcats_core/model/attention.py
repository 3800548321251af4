"""The attention function of linearized models, behind transformers' attention interface.

transformers projects, normalises and rotates. This function receives q, k, v and the pass's `HybridContext`, divides
the heads between the linear branch (`student_attention`) and kept softmax attention, and joins both outputs.

# B batch, T new tokens, S tokens so far, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import DividedLayer, HybridLayer, KeptLayer
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.forward_context import HybridContext, LayerCall
from lolcats_core.model.softmax_attention import KeptGroups, kept_attention, softmax_attention
from lolcats_kernels.hybrid_attention import attend, decode_


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
        query: [B, H, T, D]; `key`, `value`: [B, Hk, T, D] (a layer of one cache: [B, Hk, S, D]).

    Returns:
        [B, T, H, D] in the dtype of `query`, and None for the weights, which are never built.
    """
    if not hasattr(module, "kept"):
        raise UserError(
            f"{type(module).__name__} is an attention layer of a softmax model, but the checkpoint is a linearized"
            " model; load it with AutoModelForCausalLM"
        )
    context = HybridContext() if hybrid is None else hybrid
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    maps = getattr(module, "feature_maps", None)
    kept: KeptGroups = module.kept
    cached = None if context.cache is None else context.cache.layers[module.layer_idx]
    groups = kept.groups
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if context.observer is not None:
        # An observer is shown the teacher, which sees everything.
        y = softmax_attention(query, key, value, context, scores, sliding_window)
        if maps is not None:
            q, k, v, y_linear = (groups.take_linear(x) for x in (q, k, v, y))
            context.observer(LayerCall(module.layer_idx, maps, q, k, v, y_linear, scores, context))
        return y, None
    if maps is None and len(kept.parts) == 1:
        (window,) = kept.parts
        layer = cast(KeptLayer | None, cached)
        return kept_attention(query, key, value, context, scores, window, sliding_window, layer), None
    divided = cast(DividedLayer | None, cached)
    outputs: list[tuple[Sequence[int], Tensor]] = []
    if maps is not None:
        q_linear, k_linear, v_linear = (groups.take_linear(x) for x in (q, k, v))
        state = cast(HybridLayer | None, cached)
        y = student_attention(maps, q_linear, k_linear, v_linear, scores, context, state)
        outputs.append((groups.linear, y))
    for part, (window, members) in enumerate(kept.parts.items()):
        query, key, value = (groups.take(x, members).transpose(1, 2) for x in (q, k, v))
        layer = None if divided is None else divided.kept[part]
        if layer is not None:
            key, value = layer.update(key, value)
        y = kept_attention(query, key, value, context, scores, window, sliding_window, layer)
        outputs.append((members, y))
    return outputs[0][1] if len(outputs) == 1 else groups.join(*outputs), None


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
    weights, config = maps(scores)
    real = context.new_padding_mask
    q, k, v = (context.to_front(x) for x in (q, k, v))
    if context.cu_seqlens is not None:
        packed = (x.flatten(0, 1)[None] for x in (q, k, v))
        y: Any = attend(*packed, weights, config, cu_seqlens=context.cu_seqlens)
        return context.to_places(y.view(q.shape[0], -1, *q.shape[2:]))
    lengths = None if real is None else real.sum(1)
    run = functools.partial(attend, q, k, v, weights, config, lengths=lengths)
    if layer is None:
        y = run()
    elif layer.state is not None and q.shape[1] == 1 and real is None and not torch.is_grad_enabled():
        y = decode_(q, k, v, weights, config, layer.state)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *weights.tensors())):
        # No gradient passes through a state, so it is computed apart; the fused kernels then take both calls.
        y = run(initial_state=layer.state)
        with torch.no_grad():
            _, layer.state = run(initial_state=layer.state, return_state=True)
    else:
        y, layer.state = run(initial_state=layer.state, return_state=True)
    return context.to_places(y)

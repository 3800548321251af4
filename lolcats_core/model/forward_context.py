"""What the layers of one forward pass share: the cache, padding, packed documents and who observes the layers.

`prepare_inputs`, a hook before the decoder, makes one `HybridContext` per pass; every layer's attention receives it.

# B batch, T new tokens, S tokens so far, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.feature_maps import FeatureMaps, Scores


@dataclass(frozen=True)
class LayerCall:
    """The attention of one linearized layer in one forward pass, as an observer is shown it.

    Attributes:
        index: of the layer. `maps`: its feature maps.
        q: [B, T, H, D]; `k`, `v`: [B, T, Hk, D]; of the linearized heads alone, after rotary embeddings.
        y_true: [B, T, H, D], the same heads' softmax output.
        scores: how the layer scales and bounds q k^T. `context`: of the pass.
    """

    index: int
    maps: FeatureMaps
    q: Tensor
    k: Tensor
    v: Tensor
    y_true: Tensor
    scores: Scores
    context: HybridContext

    def as_packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y_true, flattened to one row where rows hold documents (at `context.cu_seqlens`)."""
        tensors = self.q, self.k, self.v, self.y_true
        if self.context.cu_seqlens is None:
            return tensors
        q, k, v, y_true = (x.flatten(0, 1)[None] for x in tensors)
        return q, k, v, y_true

    def positions(self) -> Tensor:
        """[T] of `as_packed`: each token's position in its sequence."""
        column = torch.arange(self.as_packed()[0].shape[1], device=self.q.device)
        starts = self.context.cu_seqlens
        return column if starts is None else column - starts[torch.bucketize(column, starts, right=True) - 1]


LayerObserver = Callable[[LayerCall], None]


def ignore_layer(call: LayerCall) -> None:
    """The observer of a pass that only needs the teacher's outputs."""


@dataclass
class HybridContext:
    """What the layers of one forward pass share.

    Attributes:
        cache: state to continue and to leave behind, or None.
        padding_mask: [B, S] bool, False at padding; None when nothing is padded.
        document_ids: [B, T] int, number of each token's document in its row; None when every row is one document.
        observer: stage 1: every layer computes its softmax output, shows it here and passes it on (teacher forcing).
        past_length: number of tokens before the new ones, S - T.
    """

    cache: HybridCache | None = None
    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    observer: LayerObserver | None = None
    past_length: int = 0

    @staticmethod
    def observed(observer: LayerObserver, position_ids: Tensor | None) -> HybridContext:
        """The context of a pass over whole rows, packed where `position_ids` [B, T] start again inside a row."""
        return HybridContext(observer=observer, document_ids=document_numbers(position_ids))

    @cached_property
    def new_padding_mask(self) -> Tensor | None:
        """[B, T], `padding_mask` of the new tokens; None when none of them is padding."""
        new = None if self.padding_mask is None else self.padding_mask[:, self.past_length :]
        return None if new is None or bool(new.all()) else new

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """[n + 1] boundaries of the documents in the flattened batch, or None; one tensor for all layers."""
        if self.document_ids is None:
            return None
        rows, tokens = self.document_ids.shape
        starts = torch.ones(rows, tokens, dtype=torch.bool, device=self.document_ids.device)
        starts[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        first = starts.flatten().nonzero()[:, 0]
        return torch.cat([first, first.new_tensor([rows * tokens])])


def document_numbers(position_ids: Tensor | None) -> Tensor | None:
    """[B, T] number of each token's document where positions start again inside a row; None where none does."""
    if position_ids is None:
        return None
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
    padding_mask = None if mask is None or bool(mask.bool().all()) else mask.bool()
    past_length = 0 if cache is None else cache.get_seq_length()
    document_ids = None
    if positions is None and padding_mask is not None:
        # Features depend on absolute positions, so padding must not count.
        kwargs["position_ids"] = (padding_mask.cumsum(1) - 1).clamp(min=0)[:, past_length:]
    elif positions is not None and padding_mask is None and past_length == 0 and positions.shape[-1] > 1:
        document_ids = document_numbers(positions)
    if document_ids is not None:
        # Some families give the ids by position.
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        document_ids = document_ids.expand(len(next(x for x in inputs if x is not None)), -1)
        # Packed documents leave no single state behind.
        kwargs["use_cache"], kwargs["past_key_values"], cache = False, None, None
    kwargs["hybrid"] = HybridContext(cache, padding_mask, document_ids, past_length=past_length)
    return args, kwargs

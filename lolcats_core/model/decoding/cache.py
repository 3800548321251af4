"""Decode state of a linearized model behind transformers' Cache API: constant in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_core.model.decoding.static_kv import StaticKVMixin
from lolcats_kernels.hybrid_attention import HybridState

_NO_CROP = (
    "a linearized layer cannot forget tokens (its state is a sum over them, and windows drop old tokens); decoding that"
    " takes back tokens, such as assisted or prompt-lookup decoding, needs a softmax model"
)


class GrowingLayer(StaticKVMixin, DynamicLayer):
    """Keys and values of softmax attention that sees everything."""


class SlidingLayer(StaticKVMixin, DynamicSlidingWindowLayer):
    """Keys and values of softmax attention that sees a window."""


KeptLayer = GrowingLayer | SlidingLayer


class BatchMixin:
    """For a cache layer that holds tensors besides keys and values: they follow every change of the batch."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the layer's own tensors, which have the batch as first dimension, by `function` of them."""
        raise NotImplementedError


class BoundedLayer(BatchMixin, SlidingLayer):
    """Keys and values of softmax attention that sees a window and the sequence's first tokens.

    `sinks` are the first tokens, or None before any or where the model has none; the attention function keeps them.
    """

    is_croppable = False  # the sinks would stay

    def reset(self) -> None:
        super().reset()
        self.sinks = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.sinks is not None:
            self.sinks = self.sinks.map(function)


class DividedLayer(CacheLayerMixin):
    """Cache of a layer whose kv groups are cached apart.

    The attention function appends to each part; `update` only counts.

    Attributes:
        kept: keys and values of the kv groups that keep softmax attention, a part for each window.
        length: number of cached tokens, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, kept: Sequence[KeptLayer] = ()) -> None:
        super().__init__()
        self.kept = tuple(kept)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone: the attention function finds the older ones in this layer."""
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0
        for part in self.kept:
            part.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for part in self.kept:
            part.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for part in self.kept:
            part.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.kept:
            part.batch_repeat_interleave(repeats)

    def offload(self) -> None:
        raise UserError("a linearized layer's state is constant in size; offloading it is not supported")

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError(_NO_CROP)


class HybridLayer(BatchMixin, DividedLayer):
    """Cache of one linearized layer: besides, the `state` of its linearized kv groups, None before the first token.

    The attention function reads and replaces the state.
    """

    def __init__(self, kept: Sequence[KeptLayer] = ()) -> None:
        super().__init__(kept)
        self.state: HybridState | None = None

    def reset(self) -> None:
        super().reset()
        self.state = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(function)


class HybridCache(Cache):
    """A `HybridLayer` for each linearized layer, and a `KeptLayer` for each layer or part of one that keeps softmax."""

    def __init__(self, config: PreTrainedConfig) -> None:
        settings, short, groups = LinearizeConfig.from_dict(config.linearize), local_layers(config), kv_heads(config)
        # Growing, or bounded by the layer's own sliding window.
        layers: list[Any] = DynamicCache(config=config).layers
        for i, own in enumerate(layers):
            if i in short:
                layers[i] = _kept_layer(own)
                continue
            parts = settings.softmax_parts(i, groups)
            kept = [_kept_layer(own) if size is None else BoundedLayer(size) for size in parts]
            if sum(map(len, parts.values())) < groups:
                layers[i] = HybridLayer(kept)
            else:
                layers[i] = kept[0] if len(kept) == 1 else DividedLayer(kept)
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        # Before any layer, or those that keep softmax would be cut and the others not.
        if not self.is_croppable:
            raise UserError(_NO_CROP)
        super().crop(tokens_to_remove)

    def kept_layers(self) -> list[KeptLayer]:
        """The cache layers of kept layers and kv groups, in order."""
        layers = cast(list[Any], self.layers)
        return [part for layer in layers for part in (layer.kept if isinstance(layer, DividedLayer) else (layer,))]

    def advance(self) -> None:
        """Count the token of a replayed step, which is in the states and the static storage already."""
        for layer in cast(list[Any], self.layers):
            if isinstance(layer, DividedLayer):
                layer.length += 1
        for kept in self.kept_layers():
            kept.advance()

    def detach(self) -> None:
        """Detach all cached tensors from the autograd graph."""
        for layer in cast(list[Any], self.layers):
            if isinstance(layer, HybridLayer):
                layer._map(torch.Tensor.detach)
        for kept in self.kept_layers():
            if isinstance(kept, BoundedLayer):
                kept._map(torch.Tensor.detach)
            if kept.is_initialized:
                kept.keys, kept.values = kept.keys.detach(), kept.values.detach()

    def state_bytes(self) -> int:
        """Bytes of the linearized kv groups' states: constant in the number of tokens."""
        states = (layer.state for layer in self.layers if isinstance(layer, HybridLayer) and layer.state is not None)
        return sum(_bytes(tensor) for state in states for tensor in state.tensors())

    def softmax_bytes(self) -> int:
        """Bytes of the keys and values of layers and kv groups that keep softmax attention."""
        layers = self.kept_layers()
        sinks = (layer.sinks for layer in layers if isinstance(layer, BoundedLayer) and layer.sinks is not None)
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return sum(map(_bytes, [*tensors, *(tensor for first in sinks for tensor in vars(first).values())]))


def _kept_layer(layer: Any) -> KeptLayer:
    """Our layer in the place of transformers' own, with static storage besides."""
    if type(layer) is DynamicSlidingWindowLayer:
        return SlidingLayer(layer.sliding_window)
    assert type(layer) is DynamicLayer, f"a decode cache of {type(layer).__name__} is not known here"
    return GrowingLayer()


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()

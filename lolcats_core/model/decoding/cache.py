"""Decode state of a linearized model behind transformers' Cache API: constant in the number of tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, local_layers, softmax_layers
from lolcats_core.model.decoding.static_kv import StaticKVMixin
from lolcats_kernels.hybrid_attention import HybridState

_NO_CROP = (
    "a linearized layer cannot forget tokens (its state is a sum over them); decoding that takes back tokens, such as"
    " assisted or prompt-lookup decoding, needs a softmax model"
)


class GrowingLayer(StaticKVMixin, DynamicLayer):
    """Keys and values of softmax attention that sees everything."""


class SlidingLayer(StaticKVMixin, DynamicSlidingWindowLayer):
    """Keys and values of softmax attention that sees a window."""


KeptLayer = GrowingLayer | SlidingLayer


class BoundedLayer(SlidingLayer):
    """Keys and values of softmax attention that sees a window and the sequence's first tokens.

    `sinks` are the first tokens, or None before any or where the model has none; the attention function keeps them.
    """

    def reset(self) -> None:
        super().reset()
        self.sinks = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _map(self, function: Any) -> None:
        if self.sinks is not None:
            self.sinks = self.sinks.map(function)


class HybridLayer(CacheLayerMixin):
    """Cache of one linearized layer.

    The attention function reads and replaces `state` and appends to `softmax`; `update` only counts.

    Attributes:
        state: of the linearized kv groups, or None before the first token.
        softmax: keys and values of the kv groups that keep softmax attention, or None where none does.
        length: number of cached tokens, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, softmax: KeptLayer | None = None) -> None:
        super().__init__()
        self.state: HybridState | None = None
        self.softmax = softmax
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
        self.state, self.length = None, 0
        if self.softmax is not None:
            self.softmax.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        if self.softmax is not None:
            self.softmax.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])
        if self.softmax is not None:
            self.softmax.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))
        if self.softmax is not None:
            self.softmax.batch_repeat_interleave(repeats)

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = self.state.map(function)

    def offload(self) -> None:
        raise UserError("a linearized layer's state is constant in size; offloading it is not supported")

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError(_NO_CROP)


class HybridCache(Cache):
    """A `HybridLayer` for each linearized layer, and a `KeptLayer` for each layer or kv group that keeps softmax."""

    def __init__(self, config: PreTrainedConfig) -> None:
        settings, kept = LinearizeConfig.from_dict(config.linearize), softmax_layers(config)
        # Growing, or bounded by the layer's own sliding window.
        layers: list[Any] = [_kept_layer(layer) for layer in DynamicCache(config=config).layers]
        if settings.softmax_window is not None:
            for i in {*settings.softmax_layers, *settings.softmax_heads} - {*local_layers(config)}:
                layers[i] = BoundedLayer(settings.softmax_window)
        for i, layer in enumerate(layers):
            if i not in kept:
                layers[i] = HybridLayer(layer if i in settings.softmax_heads else None)
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        # Before any layer, or those that keep softmax would be cut and the others not.
        if not self.is_croppable:
            raise UserError(_NO_CROP)
        super().crop(tokens_to_remove)

    def kept_layers(self) -> list[KeptLayer]:
        """The cache layers of kept layers and kv groups, in order."""
        layers = (layer.softmax if isinstance(layer, HybridLayer) else layer for layer in cast(list[Any], self.layers))
        return [layer for layer in layers if layer is not None]

    def advance(self) -> None:
        """Count the token of a replayed step, which is in the states and the static storage already."""
        for layer in cast(list[Any], self.layers):
            if isinstance(layer, HybridLayer):
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

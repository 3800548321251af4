"""Decoding steps as one CUDA graph: hundreds of launches a token become one.

A step of a linearized model has the same shapes and addresses at every position, so it is captured once and replayed.
Kept layers and heads copy their keys and values into static storage (`static_kv`) for it, and a graph lasts until one
of these is full.

# B batch, V vocabulary
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lolcats_core.model.decoding.cache import HybridCache, HybridLayer
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.transformers_versions import CACHE, CACHE_NAMES, given_cache

# Arguments of a call that a replay can take; any other, such as labels or an observer, needs the model itself.
_PLAIN = {
    "input_ids",
    *CACHE_NAMES,
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


@contextmanager
def graphed_decoding(model: PreTrainedModel) -> Iterator[None]:
    """While this is open, `model`'s one-token steps replay a CUDA graph where they can; results are the same.

    `generate` and direct calls with a `HybridCache` profit alike. Prefill, beam search and models that do not lie on
    one GPU run as they did. Kept keys and values take up to half as much memory again (`static_kv`); where memory has
    run out, their steps run as they did. The weights must not change meanwhile, and one thread at a time may call the
    model.
    """
    if model.device.type != "cuda" or len({parameter.device for parameter in model.parameters()}) > 1:
        yield
        return
    steps, plain = _Steps(model), model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args and steps.take(kwargs) and steps.prepare_static(kwargs):
            return steps.run(kwargs)
        return plain(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


# The process may capture one graph at a time.
_CAPTURE = threading.Lock()


class _Steps:
    """The captured step and the addresses that it works on.

    Attributes:
        last: addresses of the last step's states. `captured`: addresses of the states and static storage of the
            captured step; `rehearsed`: of the last step that ran in static storage without a graph.
        newest: [1], the new tokens' column, which all static storage of these steps reads.
        out_of_memory: whether memory for static storage has run out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.plain = model, model.forward
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tuple[int, ...] | None = None
        self.last: tuple[int, ...] | None = None
        self.rehearsed: tuple[int, ...] | None = None
        self.ids = self.positions = self.logits = torch.empty(0)
        self.newest = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.out_of_memory = False

    def take(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a step that the graph can stand for, and not the first on these addresses."""
        ids, cache, mask = kwargs.get("input_ids"), given_cache(kwargs), kwargs.get("attention_mask")
        passed = {name for name, value in kwargs.items() if value is not None and value is not False}
        if torch.is_grad_enabled() or not passed <= _PLAIN or ids is None or ids.shape[1] != 1:
            return False
        if not isinstance(cache, HybridCache) or (mask is not None and mask.dim() != 2):
            return False
        states = [layer.state for layer in cache.layers if isinstance(layer, HybridLayer)]
        if cache.get_seq_length() == 0 or any(state is None for state in states):
            return False
        if mask is not None:
            # Without waiting for the device; a new token that is padding would enter the state.
            torch._assert_async(mask[:, -1].all(), "a decoding step's tokens must not be padding")
        key = (
            *ids.shape,
            *(tensor.data_ptr() for state in states for tensor in vars(state).values() if tensor is not None),
        )
        # The first step compiles and warms up what the second records.
        again, self.last = key == self.last, key
        return again

    def prepare_static(self, kwargs: dict[str, Any]) -> bool:
        """Make the cache's kept layers static where they can be; whether all are, with a slot for the next token."""
        cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
        kept = cache.kept_layers()
        if all(layer.has_capacity(self.newest) for layer in kept):
            return True
        if self.out_of_memory or not all(layer.can_be_static() for layer in kept):
            return False
        padding_mask = None if mask is None or bool(mask.all()) else mask[:, :-1].bool()
        self._forget()
        try:
            for layer in kept:
                layer.make_static(padding_mask, self.newest)
        except torch.OutOfMemoryError:
            self.out_of_memory = True
        return not self.out_of_memory

    def run(self, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """One step: `input_ids` [B, 1] → logits [B, 1, V]."""
        ids, cache = kwargs["input_ids"], given_cache(kwargs)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = self._positions(ids, cache, kwargs.get("attention_mask"))
        positions = positions.expand(ids.shape)
        kept = cache.kept_layers()
        assert self.last is not None
        addresses = (*self.last, *(address for layer in kept for address in layer.addresses()))
        self.newest.fill_(cache.get_seq_length())
        if kept and addresses not in (self.captured, self.rehearsed):
            # The first step in new storage compiles what the second records.
            self.rehearsed = addresses
            return _output(self._step(ids, positions, cache), cache)
        if addresses != self.captured:
            self._forget()
            self._capture(ids, positions, cache)
            self.captured = addresses
        else:
            self.ids.copy_(ids)
            self.positions.copy_(positions)
            cache.advance()
        assert self.graph is not None
        self.graph.replay()
        return _output(self.logits.clone(), cache)

    def _positions(self, ids: Tensor, cache: HybridCache, mask: Tensor | None) -> Tensor:
        """[B, 1] of the new tokens: each sequence counts its own real tokens."""
        for layer in cache.layers:
            if isinstance(layer, HybridLayer):
                assert layer.state is not None
                return layer.state.length[:, None]
        return torch.full_like(ids, cache.get_seq_length()) if mask is None else mask.sum(1, keepdim=True) - 1

    def _forget(self) -> None:
        """Free the graph and its memory."""
        self.graph = self.captured = None
        self.logits = torch.empty(0)

    def _capture(self, ids: Tensor, positions: Tensor, cache: HybridCache) -> None:
        self.ids, self.positions = ids.clone(), positions.to(torch.int64).clone()
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.graph(graph):
            self.logits = self._step(self.ids, self.positions, cache)
        self.graph = graph

    def _step(self, ids: Tensor, positions: Tensor, cache: HybridCache) -> Tensor:
        """Logits of a step that runs in the states and static storage of `cache`."""
        storage = [layer.static_kv for layer in cache.kept_layers() if layer.static_kv is not None]
        context = HybridContext(cache=cache, past_length=cache.get_seq_length())
        for static in storage:
            static.stepping = True
        try:
            out = self.plain(input_ids=ids, position_ids=positions, use_cache=True, hybrid=context, **{CACHE: cache})
        finally:
            for static in storage:
                static.stepping = False
        logits: Tensor = out.logits
        return logits


def _output(logits: Tensor, cache: HybridCache) -> CausalLMOutputWithPast:
    named: dict[str, Any] = {CACHE: cache}
    return CausalLMOutputWithPast(logits=logits, **named)

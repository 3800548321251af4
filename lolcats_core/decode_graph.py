"""Decoding steps as one CUDA graph: hundreds of launches a token become one.

A step of a linearized model has the same shapes and addresses at every position, so it is captured once and replayed.

# B batch, V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lolcats_core.attention import HybridContext
from lolcats_core.cache import HybridCache, HybridLayer

# What a call may give besides; anything else, such as labels or an observer, needs the model itself.
_PLAIN = {
    "input_ids",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


@contextmanager
def graphed_decoding(model: PreTrainedModel) -> Iterator[None]:
    """While this is open, `model`'s one-token steps replay a CUDA graph where they can; results are the same.

    `generate` and direct calls with a `HybridCache` profit alike. Prefill, beam search, models on a CPU and models with
    softmax layers or heads, whose cache grows, run as they did. The weights must not change meanwhile.
    """
    if model.device.type != "cuda":
        yield
        return
    steps, plain = _Steps(model), model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args or not steps.take(kwargs):
            return plain(*args, **kwargs)
        return steps.run(kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


class _Steps:
    """The captured step and the addresses that it works on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.plain = model, model.forward
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tuple[int, ...] | None = None
        self.last: tuple[int, ...] | None = None
        self.ids = self.positions = self.logits = torch.empty(0)

    def take(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a step that the graph can stand for, and not the first on these addresses."""
        ids, cache, mask = (kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if torch.is_grad_enabled() or not given <= _PLAIN or ids is None or ids.shape[1] != 1:
            return False
        if not isinstance(cache, HybridCache) or (mask is not None and mask.dim() != 2):
            return False
        layers: list[Any] = cache.layers
        if not all(isinstance(x, HybridLayer) and x.softmax is None and x.state is not None for x in layers):
            return False
        if mask is not None:
            # Without waiting for the device; a new token that is padding would enter the state.
            torch._assert_async(mask[:, -1].all(), "a decoding step's tokens must not be padding")
        states = [tensor for layer in layers for tensor in vars(layer.state).values()]
        key = (*ids.shape, *(tensor.data_ptr() for tensor in states))
        # The first step compiles and warms up what the second records.
        again, self.last = key == self.last, key
        return again

    def run(self, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """One step: `input_ids` [B, 1] → logits [B, 1, V]."""
        ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        positions = kwargs.get("position_ids")
        # Each sequence counts its own real tokens.
        positions = cache.layers[0].state.length[:, None] if positions is None else positions.expand(ids.shape)
        if self.captured != self.last:
            self._capture(ids, positions, cache)
        else:
            self.ids.copy_(ids)
            self.positions.copy_(positions)
            for layer in cache.layers:
                layer.seen += 1
        assert self.graph is not None
        self.graph.replay()
        return CausalLMOutputWithPast(logits=self.logits.clone(), past_key_values=cache)

    def _capture(self, ids: Tensor, positions: Tensor, cache: HybridCache) -> None:
        self.graph, self.logits = None, torch.empty(0)  # what an older graph held is free before
        self.ids, self.positions = ids.clone(), positions.to(torch.int64).clone()
        graph = torch.cuda.CUDAGraph()
        context = HybridContext(cache=cache, seen=cache.get_seq_length())
        with torch.cuda.graph(graph):
            out = self.plain(
                input_ids=self.ids, position_ids=self.positions, past_key_values=cache, use_cache=True, hybrid=context
            )
        self.graph, self.logits, self.captured = graph, out.logits, self.last

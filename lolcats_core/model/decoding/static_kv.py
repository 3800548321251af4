"""Static key/value storage: lets a decoding step be captured as one CUDA graph.

A dynamic cache layer switches to a `StaticKV` while steps are replayed, and back when anything else touches its keys or
values.

# B batch, H query heads, Hk key/value heads, D head dim, C slots
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.sinks import ABSENT, Sinks
from lolcats_kernels.softmax_decode import DecodeStep, softmax_decode_

# A storage that grows is made with free slots for this share of the tokens that it holds, at least and at most so many.
GROWTH, LEAST, MOST = 0.5, 512, 8192


@dataclass
class StaticKV:
    """Keys and values of the newest tokens at fixed addresses, column c of a row in slot c mod C.

    Attributes:
        keys, values: [B, Hk, C, D]. `padding_mask`: [B, C] bool, False at padding; None where nothing is padded.
        newest: [1] int64 on the device, the new tokens' column. Whoever runs the steps sets it, and recognises storage
            of its own by it: a copied cache has another.
        length: columns so far, padding counted. `stepping`: whether the next token belongs to a static step.
    """

    keys: Tensor
    values: Tensor
    padding_mask: Tensor | None
    newest: Tensor
    length: int
    stepping: bool = False

    @staticmethod
    def of(
        keys: Tensor, values: Tensor, length: int, slots: int, padding_mask: Tensor | None, newest: Tensor
    ) -> StaticKV:
        """Storage of the `n` newest of `length` columns: keys and values [B, Hk, n, D], `padding_mask` [B, length]."""
        columns = torch.arange(length - keys.shape[2], length, device=keys.device)
        stored = [x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (keys, values)]
        for slotted, x in zip(stored, (keys, values), strict=True):
            slotted.index_copy_(2, columns % slots, x)
        mask = None
        if padding_mask is not None:
            mask = padding_mask.new_zeros(padding_mask.shape[0], slots)
            mask.index_copy_(1, columns % slots, padding_mask[:, columns])
        return StaticKV(stored[0], stored[1], mask, newest, length)

    def in_order(self, x: Tensor, count: int) -> Tensor:
        """The `count` newest columns of keys or values, oldest first: [B, Hk, count, D]."""
        if self.length <= x.shape[2]:
            return x[:, :, self.length - count : self.length]
        columns = torch.arange(self.length - count, self.length, device=x.device)
        return x[:, :, columns % x.shape[2]]


class StaticKVMixin:
    """A dynamic cache layer whose keys and values may lie in a `StaticKV`; stands before transformers' layer as a base.

    Attributes:
        sinks: the row's first tokens, where the layer sees them besides its window.
        static_kv: the storage, or None. Replacing `keys` or `values`, as every other use of the layer does, drops it.
    """

    static_kv: StaticKV | None = None
    sinks: Sinks | None = None
    _dynamic: tuple[Any, Any] = (None, None)

    @property
    def keys(self) -> Any:
        static = self.static_kv
        return self._dynamic[0] if static is None else static.in_order(static.keys, self._dynamic_length())

    @keys.setter
    def keys(self, x: Any) -> None:
        self.make_dynamic()
        self._dynamic = x, self._dynamic[1]

    @property
    def values(self) -> Any:
        static = self.static_kv
        return self._dynamic[1] if static is None else static.in_order(static.values, self._dynamic_length())

    @values.setter
    def values(self, x: Any) -> None:
        self.make_dynamic()
        self._dynamic = self._dynamic[0], x

    def _dynamic_length(self) -> int:
        """Columns that transformers' layer would hold for the next token, which sees itself besides."""
        assert self.static_kv is not None
        return self.static_kv.length if self.window is None else min(self.static_kv.length, self.window - 1)

    @property
    def window(self) -> int | None:
        """Newest columns that a token sees, or None for all."""
        return getattr(self, "sliding_window", None)

    @property
    def in_static_step(self) -> bool:
        """Whether the next token belongs to a step that runs in static storage."""
        return self.static_kv is not None and self.static_kv.stepping

    def can_be_static(self) -> bool:
        """Whether static storage can hold what the layer has; asks the device whether all sinks are there."""
        filled: bool = self.is_initialized
        return filled and (self.sinks is None or not bool((self.sinks.column == ABSENT).any()))

    def has_capacity(self, newest: Tensor) -> bool:
        """Whether the layer has storage of the steps that set `newest`, and the next token fits into it."""
        if self.static_kv is None or self.static_kv.newest is not newest:
            return False
        slots = self.static_kv.keys.shape[2]
        return self.static_kv.length < slots or slots == self.window

    def make_static(self, padding_mask: Tensor | None, newest: Tensor) -> None:
        """Copy keys and values into storage with a slot for the next token; `padding_mask`: [B, length] or None."""
        length: int = self.get_seq_length()  # type: ignore[attr-defined]
        slots = -(-(length + min(MOST, max(LEAST, int(GROWTH * length)))) // 64) * 64
        slots = slots if self.window is None else min(slots, self.window)
        static = StaticKV.of(self.keys, self.values, length, slots, padding_mask, newest)
        self._dynamic, self.static_kv = (None, None), static
        if self.sinks is not None:
            # They may be cut out of larger tensors; from here on nothing moves them.
            self.sinks = self.sinks.map(torch.Tensor.contiguous)

    def make_dynamic(self) -> None:
        """Hold keys and values as transformers does again."""
        if self.static_kv is not None:
            self._dynamic, self.static_kv = (self.keys, self.values), None

    def addresses(self) -> tuple[int, ...]:
        """The number of slots, and the address of every tensor that a captured step works on."""
        static = self.static_kv
        assert static is not None
        sinks = () if self.sinks is None else vars(self.sinks).values()
        tensors = (static.keys, static.values, static.padding_mask, *sinks)
        return (static.keys.shape[2], *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))

    def advance(self) -> None:
        """Count the token that a step puts into the storage."""
        assert self.static_kv is not None
        self.static_kv.length += 1
        if hasattr(self, "cumulative_length"):
            self.cumulative_length += 1

    def reset(self) -> None:
        """Forget all keys and values; before 5.18, transformers zeroes them and keeps their number."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers; in a static step, the new keys and values alone, which `step` stores."""
        if self.in_static_step:
            self.advance()
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Softmax attention of one token, which is stored: q [B, H, 1, D], k and v [B, Hk, 1, D] → [B, 1, H, D]."""
        static, first = self.static_kv, self.sinks
        assert static is not None
        sinks = None if first is None else (first.k, first.v, first.column)
        step = DecodeStep(
            q, k, v, static.keys, static.values, static.newest, scores.scale, scores.softcap, static.padding_mask, sinks
        )
        return softmax_decode_(step)

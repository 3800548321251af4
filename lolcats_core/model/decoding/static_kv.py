"""Softmax keys and values at fixed addresses, so that a decoding step with kept layers or heads is one CUDA graph.

A cache layer that transformers grows by concatenation moves into a `Room` while steps are replayed, and out of it as
soon as anything else changes its keys and values.

# B batch, H query heads, Hk key/value heads, D head dim, C slots of the room
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.sinks import ABSENT, Sinks
from lolcats_kernels.softmax_decode import softmax_decode_

# A growing room is made with place for this share of the tokens it holds again, at least and at most so many.
GROWTH, LEAST, MOST = 0.5, 512, 8192


@dataclass
class Room:
    """Keys and values of the newest tokens, column c of a row in slot c mod C.

    Attributes:
        keys, values: [B, Hk, C, D]. `real`: [B, C] bool, False at padding; None where nothing is padded.
        newest: [1] int64 on the device, the new tokens' column. Whoever runs the steps sets it, and knows its rooms by
            it: a copied cache has another.
        seen: columns so far. `stepping`: whether the next token is one of a step that runs in here.
    """

    keys: Tensor
    values: Tensor
    real: Tensor | None
    newest: Tensor
    seen: int
    stepping: bool = False

    @staticmethod
    def holding(keys: Tensor, values: Tensor, seen: int, slots: int, real: Tensor | None, newest: Tensor) -> Room:
        """A room with the `n` newest of `seen` columns in it; keys and values: [B, Hk, n, D], `real`: [B, seen]."""
        columns = torch.arange(seen - keys.shape[2], seen, device=keys.device)
        rooms = [x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (keys, values)]
        for room, x in zip(rooms, (keys, values), strict=True):
            room.index_copy_(2, columns % slots, x)
        marks = None
        if real is not None:
            marks = real.new_zeros(real.shape[0], slots).index_copy_(1, columns % slots, real[:, columns])
        return Room(rooms[0], rooms[1], marks, newest, seen)

    def in_order(self, x: Tensor, count: int) -> Tensor:
        """The `count` newest columns of keys or values, oldest first: [B, Hk, count, D]."""
        if self.seen <= x.shape[2]:
            return x[:, :, self.seen - count : self.seen]
        columns = torch.arange(self.seen - count, self.seen, device=x.device)
        return x[:, :, columns % x.shape[2]]


class InRoom:
    """A dynamic cache layer whose keys and values may stand in a room; before the layer of transformers in its bases.

    Attributes:
        sinks: the row's first tokens, where the layer sees them besides.
        room: where they stand, or None. Replacing `keys` or `values`, as every other use of the layer does, leaves it.
    """

    room: Room | None = None
    sinks: Sinks | None = None
    _held: tuple[Any, Any] = (None, None)

    @property
    def keys(self) -> Any:
        return self._held[0] if self.room is None else self.room.in_order(self.room.keys, self._kept())

    @keys.setter
    def keys(self, x: Any) -> None:
        self._leave()
        self._held = x, self._held[1]

    @property
    def values(self) -> Any:
        return self._held[1] if self.room is None else self.room.in_order(self.room.values, self._kept())

    @values.setter
    def values(self, x: Any) -> None:
        self._leave()
        self._held = self._held[0], x

    def _leave(self) -> None:
        if self.room is not None:
            self._held, self.room = (self.keys, self.values), None

    def _kept(self) -> int:
        """Columns that transformers' layer would hold for the next token, which sees itself besides."""
        assert self.room is not None
        return self.room.seen if self.window is None else min(self.room.seen, self.window - 1)

    @property
    def window(self) -> int | None:
        """Newest columns that a token sees, or None for all."""
        return getattr(self, "sliding_window", None)

    def may_enter(self) -> bool:
        """Whether a room can stand for the layer; asks the device whether all sinks are there."""
        filled: bool = self.is_initialized  # type: ignore[attr-defined]
        return filled and (self.sinks is None or not bool((self.sinks.column == ABSENT).any()))

    def has_place(self, newest: Tensor) -> bool:
        """Whether the layer is in a room of the steps that set `newest`, and the next token fits into it."""
        if self.room is None or self.room.newest is not newest:
            return False
        slots = self.room.keys.shape[2]
        return self.room.seen < slots or slots == self.window

    def enter(self, real: Tensor | None, newest: Tensor) -> None:
        """Move into a room with place for the next token; `real`: [B, seen] or None."""
        seen: int = self.get_seq_length()  # type: ignore[attr-defined]
        slots = -(-(seen + min(MOST, max(LEAST, int(GROWTH * seen)))) // 64) * 64
        slots = slots if self.window is None else min(slots, self.window)
        room = Room.holding(self.keys, self.values, seen, slots, real, newest)
        self._held, self.room = (None, None), room
        if self.sinks is not None:
            # They may be cut out of larger tensors; from here on nothing moves them.
            self.sinks = self.sinks.map(torch.Tensor.contiguous)

    def addresses(self) -> tuple[int, ...]:
        """Of whatever a captured step works on, and the number of slots."""
        room = self.room
        assert room is not None
        tensors = [room.keys, room.values, room.real, *([] if self.sinks is None else vars(self.sinks).values())]
        return (room.keys.shape[2], *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))

    def advance(self) -> None:
        """Count the token that a step puts into the room."""
        assert self.room is not None
        self.room.seen += 1
        if hasattr(self, "cumulative_length"):
            self.cumulative_length += 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers; in a step, the new keys and values alone, which `step` puts into the room."""
        if self.room is not None and self.room.stepping:
            self.advance()
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Softmax attention of one token that joins the room: q [B, H, 1, D], k and v [B, Hk, 1, D] → [B, 1, H, D]."""
        room, first = self.room, self.sinks
        assert room is not None
        sinks = None if first is None else (first.k, first.v, first.column)
        options = {"scale": scores.scale, "softcap": scores.softcap, "real": room.real, "sinks": sinks}
        return softmax_decode_(q, k, v, room.keys, room.values, room.newest, **options)

"""The heads of a layer whose state is constant in size, and where that state lies in vLLM's cache.

vLLM gives each sequence of each layer one page, which holds two rows: one of float32 (S and z) and one of the model's
dtype (rings and first tokens). All layers have the same rows, as long as the longest needs.

# B sequences, H query heads, Hk key/value heads, D head dim, N and M numbers in a page's two rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lolcats_common.linearize_config import LinearizeConfig, kv_heads
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.softmax_attention import KeptGroups
from lolcats_kernels.hybrid_attention import HybridConfig, HybridState, HybridWeights, empty_state, feature_count

# The rows of a page by the fields of a `HybridState` that they hold, in order.
ROWS = (("s", "z"), ("ring_k", "ring_v", "sink_k", "sink_v"))


@dataclass(frozen=True)
class Part:
    """kv groups of a layer that are computed together: the linearized ones, or kept ones with one bounded window.

    Kept groups that see the `window` newest tokens and the first `sinks` are the operator with a sliding window and
    a linear part of weight 0, so that their keys and values lie in a ring.

    Attributes:
        members: kv groups. `window`, `sinks`: of kept ones; `window` is None for the linearized.
    """

    members: tuple[int, ...]
    window: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """How one layer of a linearized model is served.

    Attributes:
        groups: its kv groups. `parts`: those with a state of constant size. `full`: those that keep softmax attention
            to all tokens (or the teacher's own window), which vLLM computes and pages.
    """

    groups: KVGroups
    parts: tuple[Part, ...]
    full: tuple[int, ...]

    @staticmethod
    def of(config: Any, layer: int) -> LayerPlan:
        """Of a layer of a linearized model's config."""
        kept = KeptGroups.of(config, layer)
        parts = [Part(kept.groups.linear)] if kept.groups.linear else []
        full: tuple[int, ...] = ()
        for window, members in kept.parts.items():
            if window.size is None:
                full = members
            else:
                parts.append(Part(members, window.size, window.sinks))
        return LayerPlan(kept.groups, tuple(parts), full)


def plans(config: Any) -> list[LayerPlan]:
    """Of every layer."""
    return [LayerPlan.of(config, layer) for layer in range(config.num_hidden_layers)]


def heads_at_once(config: Any) -> int:
    """How many kept kv groups one of vLLM's attention layers computes: the largest number that divides all layers'.

    vLLM wants pages of one size, and so layers of as many heads or of a multiple.
    """
    counts = [len(plan.full) for plan in plans(config) if plan.full]
    return math.gcd(kv_heads(config), *counts)


def head_dim(config: Any) -> int:
    """Of a transformers config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def part_state(config: Any, part: Part, batch: int, dtype: torch.dtype, device: torch.device) -> HybridState:
    """The state of a part before the first token."""
    settings = LinearizeConfig.from_dict(config.linearize)
    heads, dim = len(part.members), head_dim(config)
    if part.window is not None:
        features, state_heads = feature_count("elu", 1), heads
        windows: dict[str, Any] = {"window": "sliding", "window_size": part.window, "window_sinks": part.sinks}
    else:
        features = feature_count(settings.feature_map, settings.feature_dim)
        queries = config.num_attention_heads // kv_heads(config) if settings.k_map_per == "query_head" else 1
        state_heads = heads * queries
        windows = {name: getattr(settings, name) for name in ("window", "window_size", "window_sinks")}
    return empty_state(batch, state_heads, features, heads, dim, dim, **windows, dtype=dtype, device=device)


class StateLayout:
    """Reads and writes the states of one layer's parts in the two rows of vLLM's pages.

    Args:
        config: of the linearized model. `dtype`: of the model's activations.
    """

    def __init__(self, config: Any, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self.templates = [part_state(config, part, 1, dtype, torch.device("meta")) for part in parts]

    def sizes(self) -> tuple[int, int]:
        """Numbers that the parts need in the two rows."""
        first, second = (
            sum(x.numel() for template in self.templates for x in _fields(template, names).values()) for names in ROWS
        )
        return first, second

    def read(self, cache: Sequence[Tensor], slots: Tensor, length: Tensor) -> list[HybridState]:
        """Copies of the states in the pages `slots` [B] after `length` [B] tokens; empty ones where that is 0."""
        rows = [row[slots].masked_fill((length == 0)[:, None], 0) for row in cache]
        offsets, states = [0, 0], []
        for template in self.templates:
            found = {}
            for i, names in enumerate(ROWS):
                for name, x in _fields(template, names).items():
                    piece = rows[i][:, offsets[i] : offsets[i] + x.numel()]
                    found[name] = piece.reshape(len(slots), *x.shape[1:])
                    offsets[i] += x.numel()
            states.append(replace(template, **found, length=length.to(torch.int64)))
        return states

    def write(self, cache: Sequence[Tensor], slots: Tensor, states: Sequence[HybridState]) -> None:
        """The inverse of `read`; `length` is vLLM's to remember."""
        for row, names in zip(cache, ROWS, strict=True):
            pieces = [x.flatten(1) for state in states for x in _fields(state, names).values()]
            joined = torch.cat(pieces, 1)
            row[slots, : joined.shape[1]] = joined.to(row.dtype)


def page_shapes(config: Any, dtype: torch.dtype) -> tuple[tuple[int], tuple[int]]:
    """Shapes (N,) and (M,) of a page's rows: as long as the layer that needs most of them.

    M is even, so that a page of half-precision numbers ends at a multiple of four bytes, where float32 can begin;
    and not 0, by which vLLM cannot divide pages.
    """
    sizes = [StateLayout(config, plan.parts, dtype).sizes() for plan in plans(config) if plan.parts]
    first, second = (max(row, default=0) for row in zip(*sizes, strict=True))
    return (first,), (max(2, second + second % 2),)


def part_operands(
    config: Any, part: Part, maps: FeatureMaps | None, scores: Scores, device: torch.device
) -> tuple[HybridWeights, HybridConfig]:
    """What the operator takes for a part besides q, k and v; `maps` are the layer's."""
    if part.window is None:
        assert maps is not None
        operands: tuple[HybridWeights, HybridConfig] = maps(scores)
        return operands
    # One constant feature, and a weight of 0 for what it sums.
    heads = len(part.members)
    queries = heads * (config.num_attention_heads // kv_heads(config))
    w_q, w_k = (torch.zeros(n, head_dim(config), 1, device=device, dtype=torch.float32) for n in (queries, heads))
    ones = torch.ones(queries, device=device, dtype=torch.float32)
    kept = HybridConfig(scores.scale, scores.softcap, "sliding", part.window, "elu", part.sinks)
    return HybridWeights(w_q, w_k, ones, torch.zeros_like(ones)), kept


def _fields(state: HybridState, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: x for name in names if (x := getattr(state, name)) is not None}

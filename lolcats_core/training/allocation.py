"""Bytes as the budget: what each kv group may see, so that a student's cache has a given share of its teacher's size.

Groups come in the order of their scores. The ladder gives the first ones everything, the next ones rings, and what is
left a small window or linear attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_common.params import SelectParams
from lolcats_core.model.decoding.state_size import state_size, teacher_size
from lolcats_core.model.kv_groups import Group


@dataclass(frozen=True)
class Allocation:
    """What the budget buys.

    Attributes:
        groups: all of the model's, by score.
        sizes: newest tokens that each group with softmax attention sees (None: all); the others are linear.
        settings: of the student. length: tokens at which the bytes are counted. bytes, teacher_bytes: of one sequence.
    """

    groups: tuple[Group, ...]
    sizes: dict[Group, int | None]
    settings: LinearizeConfig
    length: int
    bytes: int
    teacher_bytes: int

    @property
    def share(self) -> float:
        """Share of the teacher's cache."""
        return self.bytes / self.teacher_bytes


def all_groups(config: PreTrainedConfig) -> list[Group]:
    """Every kv group whose keys and values grow with the tokens, in order; local layers (Gemma) are left alone."""
    layers = [layer for layer in range(config.num_hidden_layers) if layer not in local_layers(config)]
    return [(layer, group) for layer in layers for group in range(kv_heads(config))]


def keeping(settings: LinearizeConfig, kept: Iterable[Group], config: PreTrainedConfig) -> LinearizeConfig:
    """`settings` with softmax attention in exactly these kv groups."""
    by_layer: dict[int, list[int]] = {}
    for layer, group in kept:
        by_layer.setdefault(layer, []).append(group)
    whole = [layer for layer, groups in by_layer.items() if len(groups) == kv_heads(config)]
    parts = {layer: tuple(groups) for layer, groups in by_layer.items() if layer not in whole}
    return dataclasses.replace(settings, softmax_layers=tuple(whole), softmax_heads=parts)


def seeing(
    settings: LinearizeConfig, sizes: Mapping[Group, int | None], first_tokens: int, config: PreTrainedConfig
) -> LinearizeConfig:
    """`settings` with softmax attention in exactly these kv groups, which see so many of the newest tokens."""
    windows: dict[int, dict[int, int]] = {}
    for (layer, group), size in sizes.items():
        if size is not None:
            windows.setdefault(layer, {})[group] = size
    kept = keeping(settings, sizes, config)
    return dataclasses.replace(kept, softmax_windows=windows, softmax_sinks=first_tokens if windows else 0)


def allocate(
    order: Sequence[Group],
    params: SelectParams,
    settings: LinearizeConfig,
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> Allocation:
    """Give the groups, best first, the sizes of `params.ladder`, as many on its last rung as the bytes allow.

    Args:
        order: every kv group (`all_groups`). settings: of stage 1. config: of the teacher.
        dtype: of cached keys and values.

    Raises:
        UserError: `settings` name kept heads or a window for them, a size does not fit the teacher, or the bytes do not
            suffice.
    """
    assert params.cache_budget is not None
    if settings.softmax_layers or settings.softmax_heads or settings.softmax_window is not None:
        raise UserError(
            "`select.cache_budget` must be null where `linearize` names softmax layers or heads or `softmax_window`"
        )
    length = params.cache_length or getattr(config, "max_position_embeddings", None)
    if length is None:
        raise UserError("`select.cache_length` must be given for a teacher that does not state its context, got null")
    own = None if local_layers(config) else getattr(config, "sliding_window", None)
    widest = max((size for size in (params.rest, *(rung["size"] for rung in params.ladder)) if size), default=0)
    if own is not None and widest >= own:
        raise UserError(
            f"`select.ladder` and `select.rest` must stay below the teacher's own sliding window of {own}, got {widest}"
        )
    teacher = teacher_size(config, dtype).at(length)
    fixed = [rung["size"] for rung in params.ladder[:-1] for _ in range(rung["groups"] or 0)]
    if len(fixed) > len(order):
        raise UserError(f"`select.ladder` must not name more than the {len(order)} kv groups, got {len(fixed)}")
    found: Allocation | None = None
    # From the most down: where a linear group costs more than a ring, more rings may cost less.
    for count in range(len(order) - len(fixed), -1, -1):
        given = [*fixed, *[params.ladder[-1]["size"]] * count]
        if params.rest is not None:
            given += [params.rest] * (len(order) - len(given))
        sizes = dict(zip(order, given, strict=False))
        made = seeing(settings, sizes, params.first_tokens, config)
        found = Allocation(tuple(order), sizes, made, length, state_size(config, made, dtype).at(length), teacher)
        if found.share <= params.cache_budget:
            return found
    assert found is not None
    raise UserError(
        f"`select.cache_budget` must be at least {found.share:.4f} with this ladder: {params.cache_budget:g} of the"
        f" teacher's cache at {length:,} tokens is {params.cache_budget * teacher:,.0f} bytes, and {found.bytes:,} are"
        " needed with no group on its last rung"
    )

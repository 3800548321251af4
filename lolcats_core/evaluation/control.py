"""The control that every student stands beside: a plain window of the student's own bytes, with no linear branch.

Each linearized kv group becomes softmax attention to the newest tokens and the first four; what keeps softmax stays as
it is. The window is the largest whose cache takes no more bytes than the student's. A linear branch that is not better
than this does not earn its bytes (docs/quality.md; arXiv 2510.05901 found that most do not).

# T tokens of the text that the bytes are counted at
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_common.records import LossDifference
from lolcats_core.evaluation.position import buckets
from lolcats_core.model.decoding.state_size import state_size
from lolcats_core.model.kv_groups import Group
from lolcats_core.training.allocation import all_groups, seeing

SINKS = 4
# Losses of neighbouring tokens are alike, so errors are taken between the means of blocks of so many.
BLOCK = 64


def control_settings(config: Any, settings: LinearizeConfig, dtype: torch.dtype, tokens: int) -> LinearizeConfig | None:
    """Settings of the control of a student of `settings`: the same kept softmax, windows for what is linearized.

    Args:
        config: the teacher's. `dtype`: of cached keys and values. `tokens`: length at which bytes are counted.

    Returns:
        None where nothing is linearized, or the student's bytes do not hold the first tokens and a window of two.
    """
    groups, kept = all_groups(config), _kept(config, settings)
    if len(kept) == len(groups):
        return None
    unbounded = replace(settings, softmax_window=None, softmax_windows={}, softmax_sinks=0)

    def with_window(size: int) -> LinearizeConfig:
        return seeing(unbounded, {group: kept.get(group, size) for group in groups}, SINKS, config)

    budget = state_size(config, settings, dtype).at(tokens)
    smallest, own = SINKS + 1, None if local_layers(config) else getattr(config, "sliding_window", None)
    largest = min(tokens, own - 1) if own is not None else tokens

    def fits(size: int) -> bool:
        return state_size(config, with_window(size), dtype).at(tokens) <= budget

    if largest < smallest or not fits(smallest):
        return None
    low, high = smallest, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return with_window(low)


def window_of(control: LinearizeConfig, settings: LinearizeConfig, config: Any) -> int:
    """Newest tokens that the control sees in place of the linearized groups of `settings`."""
    kept = _kept(config, settings)
    layer, group = next(group for group in all_groups(config) if group not in kept)
    return control.softmax_windows[layer][group]


def _kept(config: Any, settings: LinearizeConfig) -> dict[Group, int | None]:
    """The kv groups that keep softmax attention, and the newest tokens that each sees; None for all."""
    layers = dict.fromkeys(layer for layer, _ in all_groups(config))
    return {
        (layer, group): size
        for layer in layers
        for size, groups in settings.softmax_parts(layer, kv_heads(config)).items()
        for group in groups
    }


def loss_differences(student: list[list[float]], control: list[list[float]]) -> list[LossDifference]:
    """Student's loss minus the control's by range of positions, paired token by token; negative: the student is better.

    Args:
        student, control: losses in nats of the same rows, [rows][T - 1]; None where a token does not count.
    """
    difference = np.array(student, float) - np.array(control, float)
    found: list[LossDifference] = []
    for start, stop in buckets(difference.shape[1] + 1):
        inside = difference[:, max(0, start - 1) : stop - 1]
        width = min(BLOCK, inside.shape[1])
        blocks = inside[:, : inside.shape[1] // width * width].reshape(-1, width)
        blocks = blocks[~np.isnan(blocks).all(1)]
        if len(blocks) > 1:
            means = np.nanmean(blocks, 1)
            error = float(means.std(ddof=1) / len(means) ** 0.5)
            found.append({"start": start, "stop": stop, "difference": float(means.mean()), "stderr": error})
    return found

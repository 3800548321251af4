"""Switching one branch of linearized heads off: to audit a model, and as dropout while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from lolcats_core.model.feature_maps import FeatureMaps
from lolcats_core.model.modeling import feature_maps

Branch = Literal["linear", "window"]


@contextlib.contextmanager
def without_branch(maps: Iterable[nn.Module], branch: Branch) -> Iterator[None]:
    """Inside the block, one branch of the heads of `maps` (`FeatureMaps`, or peft's wrapper of them) is off.

    Without the ``linear`` branch only the window is left. Without the ``window`` the linear branch sees every token up
    to the query, as in pure linear attention.

    Raises:
        ValueError: the other branch is off already.
    """
    # A wrapper holds the maps that it trains beside the original ones.
    changed = [(each, each.active) for module in maps for each in module.modules() if isinstance(each, FeatureMaps)]
    if any(active == branch for _, active in changed):
        raise ValueError(f"one branch must stay on: `{branch}` is the only one left")
    for each, _ in changed:
        each.active = "window" if branch == "linear" else "linear"
    try:
        yield
    finally:
        for each, active in changed:
            each.active = active


@contextlib.contextmanager
def window_dropout(module: nn.Module, share: float) -> Iterator[None]:
    """Inside the block, which is one training step, each layer's window is off with probability `share`.

    A hybrid whose loss the window alone can satisfy stops using its linear branch (arXiv 2510.05901); a layer without
    its window has nothing else. Drawn from torch's generator, whose state is part of a step checkpoint.
    """
    if not share:
        yield
        return
    layers = list(feature_maps(module).values())
    drawn = torch.rand(len(layers)) < share
    with without_branch([maps for maps, off in zip(layers, drawn.tolist(), strict=True) if off], "window"):
        yield

"""Switching one branch of linearized heads off: to audit a model, and as dropout while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from lolcats_core.model.modeling import feature_maps

Branch = Literal["linear", "window"]


@contextlib.contextmanager
def without_branch(maps: Iterable[Any], branch: Branch) -> Iterator[None]:
    """Inside the block, one branch of the heads of `maps` (`FeatureMaps`, or peft's wrapper of them) is off.

    Without the ``linear`` branch only the window is left. Without the ``window`` the linear branch sees every token up
    to the query, as in pure linear attention.
    """
    changed = []
    for each in maps:
        changed.append((each, vars(each).get("operands")))
        # An attribute of the instance goes before the method of its class.
        each.operands = _without(each.operands, branch)
    try:
        yield
    finally:
        for each, outer in changed:
            if outer is None:
                del each.operands
            else:
                each.operands = outer


def _without(operands: Callable[[Any], Any], branch: Branch) -> Callable[[Any], Any]:
    def changed(scores: Any) -> Any:
        maps, options = operands(scores)
        if branch == "window":
            return maps, {**options, "window": "none"}
        return maps, {**options, "linear_factor": torch.zeros_like(maps[2])}

    return changed


@contextlib.contextmanager
def window_dropout(module: nn.Module, share: float) -> Iterator[None]:
    """Inside the block, which is one training step, each layer's window is off with probability `share`.

    A hybrid whose loss the window alone can satisfy stops using its linear branch (arXiv 2510.05901); a layer without
    its window has nothing else. Drawn from torch's generator, whose state is part of a step checkpoint.
    """
    if not share:
        yield
        return
    found = list(feature_maps(module).values())
    drawn = torch.rand(len(found)) < share
    with without_branch([maps for maps, off in zip(found, drawn.tolist(), strict=True) if off], "window"):
        yield

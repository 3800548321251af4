"""The parameters that linearizing adds to an attention layer: feature maps and window factors.

# H linearized query heads, Hk linearized key/value heads, D head dim, F columns of a map
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.rotary import Rotary
from lolcats_kernels.hybrid_attention import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.mixture import ShareWeights

Branch = Literal["linear", "window"]
BRANCHES: frozenset[Branch] = frozenset(("linear", "window"))
# Initial values of what decides the share, in the order of `ShareWeights`: one softmax over window and features.
SHARE = {"share_offset": 0.0, "share_query": 0.0, "share_count": 1.0, "share_match": 1.0, "share_window": 1.0}


@dataclass(frozen=True)
class Scores:
    """How a layer turns q k^T into scores: times `scale`, then bounded by `softcap` (Gemma 2)."""

    scale: float
    softcap: float | None = None


class FeatureMaps(nn.Module):
    """Maps of queries and keys and the window factor of one layer (arXiv 2410.10254, sections 3.1 and 3.2).

    `groups` says which of the layer's kv groups have them; those that keep softmax attention have none. `active` says
    which branches of these heads are on (`branches.without_branch`).

    Parameters (float32, whatever the model's dtype: steps of 1e-2 are lost in bf16):
        w_q [H, D, F], w_k [H or Hk, D, F], b_q, b_k (with `feature_map_bias`), and
        window_factor [H], whose sigmoid is gamma, or, with `combine: mixture` in its place, share_offset, share_count,
        share_match and share_window [H] and share_query [H, D] (`ShareWeights`); with `linear_decay` also decay [heads
        of the key map], its logit.

    `rotary` is how the layer's q and k were rotated, set by the model where features read them before that.
    """

    rotary: Rotary | None = None

    def __init__(self, config: LinearizeConfig, groups: KVGroups, queries_per_group: int, head_dim: int) -> None:
        super().__init__()
        self.settings, self.groups = config, groups
        self.active = BRANCHES
        key_heads = len(groups.linear)
        heads = key_heads * queries_per_group
        self.heads, self.head_dim = heads, head_dim
        if config.feature_map_init == "identity" and config.feature_dim != head_dim:
            raise UserError(
                f"`feature_map_init: identity` needs `feature_dim` equal to the head dim {head_dim},"
                f" got {config.feature_dim}"
            )
        map_heads = heads if config.k_map_per == "query_head" else key_heads
        shape = (head_dim, config.feature_dim)
        self.w_q = nn.Parameter(torch.empty(heads, *shape, dtype=torch.float32))
        self.w_k = nn.Parameter(torch.empty(map_heads, *shape, dtype=torch.float32))
        bias = config.feature_map_bias
        self.b_q = nn.Parameter(torch.empty(heads, config.feature_dim, dtype=torch.float32)) if bias else None
        self.b_k = nn.Parameter(torch.empty(map_heads, config.feature_dim, dtype=torch.float32)) if bias else None
        mixed = config.combine == "mixture"
        self.window_factor = None if mixed else nn.Parameter(torch.empty(heads, dtype=torch.float32))
        for name in SHARE if mixed else ():
            size = (heads, head_dim) if name == "share_query" else (heads,)
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=torch.float32)))
        decays = config.linear_decay is not None
        self.decay = nn.Parameter(torch.empty(map_heads, dtype=torch.float32)) if decays else None
        if self.w_q.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initial values: the key map starts as a copy of the query map of the (first) head that it serves.

        ``calibrated`` maps are drawn as ``kaiming`` ones until `calibration` has seen data.
        """
        if self.settings.feature_map_init == "identity":
            self.w_q.copy_(torch.eye(self.head_dim))
        else:
            # Kaiming-uniform over the [H, D, F] tensor as published: fan-in D F.
            bound = math.sqrt(6 / (self.head_dim * self.settings.feature_dim))
            draw = torch.rand(self.w_q.shape, generator=generator, dtype=torch.float32)
            self.w_q.copy_((2 * draw - 1) * bound)
        self.w_k.copy_(self.w_q[:: self.heads // self.w_k.shape[0]])
        for bias in (self.b_q, self.b_k):
            if bias is not None:
                bias.zero_()
        for name, initial in SHARE.items() if self.settings.combine == "mixture" else ():
            getattr(self, name).fill_(initial)
        for factor, value in (
            (self.window_factor, self.settings.init_window_factor),
            (self.decay, self.settings.linear_decay),
        ):
            if factor is not None and value is not None:
                factor.fill_(math.log(value / (1 - value)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureMaps:
        """Move the maps with the model, but leave their dtype: `.half()` and loading in fp16 give the same model."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        applied: FeatureMaps = super()._apply(moved, recurse)
        return applied

    def forward(self, scores: Scores) -> tuple[HybridWeights, HybridConfig]:
        """What the operator takes besides q, k and v, for the branches that are active.

        As a call of the module, so that hooks around it (accelerate's fetch offloaded parameters) run before it.

        Args:
            scores: of the layer that the maps belong to.
        """
        config = self.settings
        decay = None if self.decay is None else self.decay.sigmoid()
        alpha = share = None
        if self.window_factor is not None:
            gamma = self.window_factor.sigmoid()
            alpha = 1 - gamma if config.linear_factor == "affine" else None
        else:
            gamma = self.w_q.new_ones(self.heads)
            # One branch alone needs no share: it is a mean of values already.
            share = self._share() if self.active == BRANCHES else None
        if "linear" not in self.active:
            alpha = torch.zeros_like(gamma)
        rotary = self.rotary if config.feature_positions == "unrotated" else None
        frequencies = None if rotary is None else rotary.frequencies(self.w_q.device)
        weights = HybridWeights(self.w_q, self.w_k, gamma, alpha, self.b_q, self.b_k, decay, share, frequencies)
        windowed = "window" in self.active
        return weights, HybridConfig(
            scores.scale,
            scores.softcap,
            config.window if windowed else "none",
            config.window_size,
            config.feature_map,
            config.window_sinks if windowed else 0,
            rotary is not None and rotary.interleaved,
        )

    def _share(self) -> ShareWeights:
        return ShareWeights(*(getattr(self, name) for name in SHARE))

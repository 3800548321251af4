"""What decoding holds for one sequence, in bytes, by part: known from the settings alone.

# H query heads, Hk key/value heads, D head dim, E features
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lolcats_common.linearize_config import LinearizeConfig, local_layers
from lolcats_common.records import StateBytes
from lolcats_kernels.hybrid_attention import empty_state, feature_count
from lolcats_kernels.hybrid_attention.state import HybridState


@dataclass(frozen=True)
class StateSize:
    """Bytes per sequence.

    Attributes:
        linear: S, z and ring of the linearized heads, constant.
        exact: keys and values of kept softmax with a window and of local layers, once full.
        per_token: what each token adds in kept softmax without a window; 0 when the whole state is bounded.
    """

    linear: int
    exact: int
    per_token: int

    def at(self, tokens: int) -> int:
        """Bytes after `tokens` tokens, all windows being full."""
        return self.linear + self.exact + self.per_token * tokens


def state_size(config: Any, settings: LinearizeConfig, dtype: torch.dtype) -> StateSize:
    """State of a model of the shape of `config` (the teacher's or the student's) linearized with `settings`.

    Args:
        dtype: of activations, and so of cached keys and values.
    """
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    element = torch.finfo(dtype).bits // 8
    token, column = 2 * dim * element, torch.int64.itemsize
    short = local_layers(config)
    own_window: int | None = getattr(config, "sliding_window", None)
    linear = exact = per_token = 0
    for layer in range(config.num_hidden_layers):
        local = layer in short
        whole = local or layer in settings.softmax_layers
        kept = key_heads if whole else len(settings.softmax_heads.get(layer, ()))
        if kept < key_heads:
            linear += _hybrid_bytes(settings, key_heads - kept, heads // key_heads, dim, dtype)
        # Either the local layers have the teacher's window or, where there are none, all have.
        window = own_window if local or not short else None
        if not local and settings.softmax_window is not None:
            window = settings.softmax_window
        sinks = 0 if local else settings.softmax_sinks
        if window is None:
            per_token += kept * token
        elif kept:
            # The newest token's query sees a whole window, but the next one's no longer its oldest token.
            exact += kept * token * (window - 1 + sinks) + sinks * column
    return StateSize(linear, exact, per_token)


def published_settings(config: Any) -> LinearizeConfig:
    """The paper's: 64 features and their mirror images per query head, a window of 64, no layer kept."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return replace(LinearizeConfig(), feature_dim=min(64, dim))


def state_facts(config: Any, settings: LinearizeConfig, dtype: torch.dtype) -> StateBytes:
    """The student's state beside the published recipe's and what the teacher's cache grows by, all in bytes."""
    student, published = (state_size(config, chosen, dtype) for chosen in (settings, published_settings(config)))
    whole = LinearizeConfig(softmax_layers=tuple(range(config.num_hidden_layers)))
    teacher = state_size(config, whole, dtype)
    return {
        "linear": student.linear,
        "exact": student.exact,
        "per_token": student.per_token,
        "published": published.linear + published.exact,
        "teacher_per_token": teacher.per_token,
    }


def _hybrid_bytes(settings: LinearizeConfig, key_heads: int, group: int, dim: int, dtype: torch.dtype) -> int:
    state: HybridState = empty_state(
        1,
        key_heads * (group if settings.k_map_per == "query_head" else 1),
        feature_count(settings.feature_map, settings.feature_dim),
        key_heads,
        dim,
        dim,
        window=settings.window,
        window_size=settings.window_size,
        dtype=dtype,
        device=torch.device("meta"),
        window_sinks=settings.window_sinks,
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in state.tensors())

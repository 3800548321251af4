"""What decoding holds for one sequence, in bytes, by part: known from the settings alone.

# H query heads, Hk key/value heads, D head dim, E features
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_common.records import StateBytes
from lolcats_kernels.hybrid_attention import empty_state, feature_count
from lolcats_kernels.hybrid_attention.state import HybridState


@dataclass(frozen=True)
class StateSize:
    """Bytes per sequence: what every report, study and budget counts with.

    Attributes:
        linear: S, z and ring of the linearized heads, constant.
        windows: of each bounded part of kept softmax and of local layers: bytes of a token, and tokens once full.
        sinks: first tokens beside those windows, held from the start.
        per_token: what each token adds in kept softmax without a window; 0 when the whole state is bounded.
    """

    linear: int
    windows: tuple[tuple[int, int], ...]
    sinks: int
    per_token: int

    @property
    def exact(self) -> int:
        """Bytes of kept softmax with a window and of local layers, once full."""
        return self.sinks + sum(token * capacity for token, capacity in self.windows)

    def at(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        held = sum(token * min(tokens, capacity) for token, capacity in self.windows)
        return self.linear + self.sinks + held + self.per_token * tokens


def state_size(config: Any, settings: LinearizeConfig, dtype: torch.dtype) -> StateSize:
    """State of a model of the shape of `config` (the teacher's or the student's) linearized with `settings`.

    Args:
        dtype: of activations, and so of cached keys and values.
    """
    heads, key_heads = config.num_attention_heads, kv_heads(config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    element = torch.finfo(dtype).bits // 8
    token, column = 2 * dim * element, torch.int64.itemsize
    short = local_layers(config)
    own_window: int | None = getattr(config, "sliding_window", None)
    linear = sinks = per_token = 0
    windows: list[tuple[int, int]] = []
    for layer in range(config.num_hidden_layers):
        local = layer in short
        parts = {None: tuple(range(key_heads))} if local else settings.softmax_parts(layer, key_heads)
        kept = sum(map(len, parts.values()))
        if kept < key_heads:
            linear += _hybrid_bytes(settings, key_heads - kept, heads // key_heads, dim, dtype)
        for size, members in parts.items():
            # Either the local layers have the teacher's window or, where there are none, all have.
            window = size or (own_window if local or not short else None)
            if window is None:
                per_token += len(members) * token
                continue
            # The newest token's query sees a whole window, but the next one's no longer its oldest token.
            windows.append((len(members) * token, window - 1))
            if size is not None:
                sinks += settings.softmax_sinks * (len(members) * token + column)
    return StateSize(linear, tuple(windows), sinks, per_token)


def teacher_size(config: Any, dtype: torch.dtype) -> StateSize:
    """The teacher's own cache, as `state_size`."""
    return state_size(config, LinearizeConfig(softmax_layers=tuple(range(config.num_hidden_layers))), dtype)


def published_settings(config: Any) -> LinearizeConfig:
    """The paper's: 64 features and their mirror images per query head, a window of 64, no layer kept."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return replace(LinearizeConfig(), feature_dim=min(64, dim))


def state_facts(config: Any, settings: LinearizeConfig, dtype: torch.dtype) -> StateBytes:
    """The student's state beside the published recipe's and what the teacher's cache grows by, all in bytes."""
    student, published = (state_size(config, chosen, dtype) for chosen in (settings, published_settings(config)))
    teacher = teacher_size(config, dtype)
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

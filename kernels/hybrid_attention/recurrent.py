"""Recurrent form of the hybrid attention: one token per sequence, constant time and memory.

# B batch, H query heads, Hk key/value heads, Hs heads of the state, D head dim, E features, R ring slots, s sinks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map
from lolcats_kernels.hybrid_attention.mixture import linear_share, log_count, unrotate
from lolcats_kernels.hybrid_attention.naive import NO_WINDOW_EPSILON, window_mask, window_scores
from lolcats_kernels.hybrid_attention.state import HybridState, folded_tokens


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig, state: HybridState
) -> tuple[Tensor, HybridState]:
    """Output of one new token of each sequence, which may stand at different positions.

    Args:
        q: [B, 1, H, D]; `k`, `v`: [B, 1, Hk, D].

    Returns:
        y [B, 1, H, D] in the dtype of S, and the new state (the old one is left as it was).
    """
    batch, _, heads, _ = q.shape
    key_heads, accumulate, position = k.shape[2], state.s.dtype, state.length
    q, k_new, v_new = q[:, 0].to(accumulate), k[:, 0], v[:, 0]
    everyone = torch.arange(batch, device=q.device)
    decay = None if weights.decay is None else weights.decay.to(accumulate)
    turn = weights.frequencies, config.rotary_interleaved

    def folded(rows: Tensor, k_out: Tensor, v_out: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """S and z with tokens [b, n, Hk, D] of sequences `rows` added, which stand at `positions` [b, n]."""
        k_out, values = (x.to(accumulate).transpose(1, 2) for x in (k_out, v_out))
        if weights.w_k.shape[0] == heads:
            k_out = k_out.repeat_interleave(heads // key_heads, 1)
        k_out = unrotate(k_out, positions[:, None], *turn)
        phi = apply_feature_map(k_out, weights.w_k, config.feature_map, weights.b_k)
        if config.window_sinks:
            phi = phi * (positions >= config.window_sinks)[:, None, :, None].to(phi.dtype)
        values = values.repeat_interleave(phi.shape[1] // key_heads, 1)
        s, z = state.s, state.z
        if decay is not None:
            span = phi.shape[2]
            phi = phi * (decay[:, None] ** torch.arange(span, 0, -1, device=phi.device))[..., None]
            gone = decay[:, None] ** span
            s, z = (x.index_copy(0, rows, x[rows] * f) for x, f in ((s, gone[..., None]), (z, gone)))
        return s.index_add(0, rows, phi.mT @ values), z.index_add(0, rows, phi.sum(-2))

    s, z, ring_k, ring_v = state.s, state.z, state.ring_k, state.ring_v
    inside = None
    if config.window == "none":
        s, z = folded(everyone, k, v, position[:, None])
    else:
        slots, size = ring_k.shape[1], config.window_size
        # Terraced folds a whole chunk when its slots are needed again; sliding folds the evicted token.
        due = position >= slots
        if config.window == "terraced":
            due &= position % size == 0
        rows = due.nonzero()[:, 0]
        if len(rows):
            span = size if config.window == "terraced" else 1
            leaving = (position[rows] % slots)[:, None] + torch.arange(span, device=q.device)
            positions = (position[rows] - slots)[:, None] + torch.arange(span, device=q.device)
            s, z = folded(rows, ring_k[rows[:, None], leaving], ring_v[rows[:, None], leaving], positions)
        slot = position % slots
        ring_k = ring_k.index_put((everyone, slot), k_new.to(ring_k.dtype))
        ring_v = ring_v.index_put((everyone, slot), v_new.to(ring_v.dtype))
        inside = _slots_in_window(position, slots, config.window, config.window_size)
    sink_k, sink_v = state.sink_k, state.sink_v
    if sink_k is not None and sink_v is not None:
        sink_k, sink_v = (_with_sink(old, new, position) for old, new in ((sink_k, k_new), (sink_v, v_new)))

    q_plain = unrotate(q[:, :, None], position[:, None, None], *turn)
    phi_q = apply_feature_map(q_plain, weights.w_q, config.feature_map, weights.b_q)[:, :, 0]
    grouped = phi_q.unflatten(1, (s.shape[1], -1))
    age = position - folded_tokens(position + 1, config.window, config.window_size)
    gamma, alpha = (x.to(accumulate)[:, None] for x in (weights.window_factor, weights.linear_factor_or_ones()))
    if decay is not None and weights.share is None:
        grouped = grouped * (decay ** age[:, None])[..., None, None]
    numerator, denominator = (grouped @ s).flatten(1, 2), (grouped @ z[..., None]).flatten(1, 2)
    if inside is None:
        y = alpha * numerator / (alpha * denominator + NO_WINDOW_EPSILON)
    else:
        if sink_k is not None and sink_v is not None:
            column = torch.arange(config.window_sinks, device=q.device)
            at = position[:, None]
            left_window = (column <= at) & ~window_mask(config.window, at, column, config.window_size)
            inside = torch.cat([inside, left_window], 1)
            ring_seen = torch.cat([ring_k, sink_k], 1), torch.cat([ring_v, sink_v], 1)
        else:
            ring_seen = ring_k, ring_v
        keys, values = (seen.to(accumulate).transpose(1, 2) for seen in ring_seen)
        scores = window_scores((q.unflatten(1, (key_heads, -1)) @ keys.mT).flatten(1, 2), config.scale, config.softcap)
        scores = scores.masked_fill(~inside[:, None], float("-inf"))
        if weights.share is None:
            windowed = gamma * (scores - scores.amax(-1, keepdim=True)).exp()
            values = F.pad(values, (0, 1), value=1.0)
            total = alpha * torch.cat([numerator, denominator], -1)
            total = total + (windowed.unflatten(1, (key_heads, -1)) @ values).flatten(1, 2)
            y = total[..., :-1] / total[..., -1:]
        else:
            outside = (position - age - config.window_sinks).clamp(min=0)[:, None]
            log_decay = None if decay is None else decay.log().repeat_interleave(heads // len(decay))
            relative = log_count(outside.to(accumulate), 1, log_decay)
            r = linear_share(
                weights.share.view(heads),
                q_plain[:, :, 0],
                denominator[..., 0],
                relative,
                relative if log_decay is None else relative + age[:, None] * log_decay,
                scores.logsumexp(-1),
                outside > 0,
            )[..., None]
            windowed = scores.softmax(-1).unflatten(1, (key_heads, -1)) @ values
            y = (1 - r) * windowed.flatten(1, 2) + r * numerator / denominator.clamp(min=NO_WINDOW_EPSILON)

    return y[:, None], HybridState(s, z, ring_k, ring_v, position + 1, sink_k, sink_v)


def _with_sink(sinks: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """Sinks [B, s, Hk, D] with the new tokens [B, Hk, D] at `position` [B] among them."""
    here = torch.arange(sinks.shape[1], device=sinks.device) == position[:, None]
    return torch.where(here[..., None, None], new[:, None].to(sinks.dtype), sinks)


def _slots_in_window(position: Tensor, slots: int, window: str, window_size: int) -> Tensor:
    """[B, R], True where a ring slot holds a token of the window of the token at `position`."""
    slot = torch.arange(slots, device=position.device)[None, :]
    if window == "sliding":
        return slot <= position[:, None]
    current = (position % slots)[:, None]
    own_chunk = slot // window_size == current // window_size
    return torch.where(own_chunk, slot <= current, position[:, None] >= window_size)

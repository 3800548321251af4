"""Chunked form of the hybrid attention: linear in time and memory, any device, differentiable.

Chunks have the window's size, so what a query sees splits into its own chunk, the previous chunk and a state that
sums all chunks before those:

    terraced   own chunk and previous chunk by softmax, older chunks through the state
    sliding    the same, but keys of the previous chunk that have left the window are linear, pair by pair
    none       own chunk linear, pair by pair; all earlier chunks through the state

A column of ones beside v makes the denominator one more column of the numerator. With a decay d, the state before chunk
n counts a token at position j with d^(n C - j), and a query at n C + r takes it with d^r. The sequence's first tokens
(`window_sinks`) are further columns of the softmax wherever they have left the window, and are in no state.

# B batch, T tokens, N chunks, C chunk size, H = Hk G query heads, Hk key/value heads, D head dim, E features, s sinks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map
from lolcats_kernels.hybrid_attention.mixture import linear_share, log_count, unrotate
from lolcats_kernels.hybrid_attention.naive import NO_WINDOW_EPSILON, window_mask, window_scores
from lolcats_kernels.hybrid_attention.state import folded_tokens


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, D] → [B, H, N, C, D], zero-padded at the end."""
    batch, length, heads, dim = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % size))
    return x.view(batch, -1, size, heads, dim).permute(0, 3, 1, 2, 4)


def _previous(x: Tensor) -> Tensor:
    """Chunk n - 1 in the place of chunk n (dimension -3); zeros before the first."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[..., :-1, :, :]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, …] → [B, Hk, H / Hk, …]; one feature map per kv head leaves a group dimension of one."""
    return x.unflatten(1, (groups, -1))


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    initial_state: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of sequences that start on a chunk boundary, and the features of their keys.

    Rows may be longer than their sequence: a token sees nothing after itself, so what follows does no harm.

    Args:
        q: [B, T, H, D]; `k`, `v`: [B, T, Hk, D]; all float32 or float64.
        initial_state: (S [B, Hs, E, D], z [B, Hs, E]) of older tokens, all of them outside every window.
        first: [B], position of each row's first token in its sequence, a multiple of the chunk; 0 unless given.
        sinks: keys and values [B, s, Hk, D] of each sequence's first tokens; those of the row unless given.

    Returns:
        y [B, T, H, D] and phi(k) [B, Hk, H/Hk or 1, N, C, E].
    """
    length, heads, key_heads, size, window = q.shape[1], q.shape[2], k.shape[2], config.window_size, config.window
    one_map_per_query_head = weights.w_k.shape[0] == heads
    if config.window_sinks and sinks is None:
        sinks = first_tokens(k, config.window_sinks), first_tokens(v, config.window_sinks)
    qc, kc, vc = _chunks(q, size), _chunks(k, size), _chunks(v, size)
    repeated = kc.repeat_interleave(heads // key_heads, 1) if one_map_per_query_head else kc
    starts = torch.arange(qc.shape[2], device=q.device) * size + (0 if first is None else first[:, None])
    positions = (starts[..., None] + torch.arange(size, device=q.device)).expand(q.shape[0], -1, -1)  # [B, N, C]
    turn = weights.frequencies, config.rotary_interleaved
    q_plain, k_plain = (unrotate(x, positions[:, None], *turn) for x in (qc, repeated))

    def features(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        phi = apply_feature_map(x.flatten(2, 3), w, config.feature_map, bias)
        return _grouped(phi.unflatten(2, (-1, size)), key_heads)

    phi_q, phi_k = features(q_plain, weights.w_q, weights.b_q), features(k_plain, weights.w_k, weights.b_k)
    if config.window_sinks:
        phi_k = phi_k * (positions >= config.window_sinks)[:, None, None, :, :, None].to(phi_k.dtype)
    qc = _grouped(qc, key_heads)
    kc, vc = kc[:, :, None], F.pad(vc, (0, 1), value=1.0)[:, :, None]

    factors = weights.window_factor, weights.linear_factor_or_ones()
    gamma, alpha = (x.to(q.dtype).view(key_heads, -1, 1, 1, 1) for x in factors)
    decay = None if weights.decay is None else weights.decay.to(q.dtype).view(key_heads, -1, 1, 1, 1)
    rows = torch.arange(size, device=q.device)[:, None]

    # State before each chunk: S_n sums chunks 0 … n-2, or 0 … n-1 without a window.
    lag = 1 if window == "none" else 2
    sums = (phi_k if decay is None else phi_k * decay ** (lag * size - rows)).mT @ vc
    past = F.pad(sums, (0, 0, 0, 0, lag, 0))[..., : sums.shape[-3], :, :]
    initial = None
    if initial_state is not None:
        s, z = initial_state
        initial = _grouped(torch.cat([s, z[..., None]], -1), key_heads)
    if decay is None:
        past = past.cumsum(-3) if initial is None else past.cumsum(-3) + initial[:, :, :, None]
        linear = phi_q @ past
    else:
        past = _decayed_scan(past, initial, decay[..., 0] ** size)
        linear = phi_q @ past
    if weights.share is None:
        total = alpha * linear if decay is None else alpha * decay**rows * linear

    if window == "none":
        columns = torch.arange(size, device=q.device)[None, :]
        own = (phi_q @ phi_k.mT).masked_fill(columns > rows, 0)
        if decay is not None:
            own = own * decay ** (rows - columns).clamp(min=0)
        total = total + alpha * (own @ vc)
        y = total[..., :-1] / (total[..., -1:] + NO_WINDOW_EPSILON)
    else:
        # Positions relative to the start of the previous chunk, which is absent before the first one.
        queries, keys = rows + size, torch.arange(2 * size, device=q.device)[None, :]
        inside = window_mask(window, queries, keys, size)
        absent = torch.zeros(kc.shape[-3], 1, 1, dtype=torch.bool, device=q.device)
        absent[0] = True
        scores = window_scores(qc @ torch.cat([_previous(kc), kc], -2).mT, config.scale, config.softcap)
        scores = scores.masked_fill(~inside | (absent & (keys < size)), float("-inf"))
        values = torch.cat([_previous(vc), vc], -2)
        if sinks is not None:
            k_first, v_first = (x.transpose(1, 2)[:, :, None, None] for x in sinks)
            column = torch.arange(config.window_sinks, device=q.device)
            at = positions[..., None]
            left_window = ((column <= at) & ~window_mask(window, at, column, size))[:, None, None]
            further = window_scores(qc @ k_first.mT, config.scale, config.softcap)
            scores = torch.cat([scores, further.masked_fill(~left_window, float("-inf"))], -1)
            v_first = F.pad(v_first, (0, 1), value=1.0).expand(-1, -1, -1, values.shape[-3], -1, -1)
            values = torch.cat([values, v_first], -2)
        if weights.share is not None:
            outside = (starts - size - config.window_sinks).clamp(min=0).view(-1, 1, 1, starts.shape[-1], 1)
            log_decay = None if decay is None else decay[..., 0].log()
            relative = log_count(outside.to(q.dtype), size + 1, log_decay)
            r = linear_share(
                weights.share.view(key_heads, heads // key_heads, 1, 1),
                _grouped(q_plain, key_heads),
                linear[..., -1],
                relative,
                relative if log_decay is None else relative + rows[:, 0] * log_decay,
                scores.logsumexp(-1),
                outside > 0,
            )[..., None]
            y_linear = linear[..., :-1] / linear[..., -1:].clamp(min=NO_WINDOW_EPSILON)
            y = (1 - r) * (scores.softmax(-1) @ values)[..., :-1] + r * y_linear
        else:
            windowed = gamma * (scores - scores.amax(-1, keepdim=True)).exp()
            if window == "sliding":
                left = (phi_q @ _previous(phi_k).mT).masked_fill(inside[:, :size] | absent, 0)
                if decay is not None:
                    left = left * decay ** (queries - keys[:, :size])
                windowed = windowed + F.pad(alpha * left, (0, size + config.window_sinks))
            total = total + windowed @ values
            y = total[..., :-1] / total[..., -1:]
    y = y.flatten(1, 2).flatten(2, 3)[:, :, :length]
    return y.transpose(1, 2), phi_k


def first_tokens(x: Tensor, count: int) -> Tensor:
    """[B, count, H, D]: the first tokens of [B, T, H, D], zeros where a row is shorter."""
    return F.pad(x[:, :count], (0, 0, 0, 0, 0, max(0, count - x.shape[1])))


def _decayed_scan(sums: Tensor, initial: Tensor | None, factor: Tensor) -> Tensor:
    """States before each chunk: state n = factor * state n-1 + sums n, from `initial` before the first.

    Args:
        sums: [B, Hk, G, N, E, D], nothing at chunk 0; `initial`: [B, Hk, G, E, D] or None; `factor`: [Hk, G, 1, 1].
    """
    state = torch.zeros_like(sums[:, :, :, 0]) if initial is None else initial
    states = [state]
    for chunk in sums.unbind(3)[1:]:
        state = factor * state + chunk
        states.append(state)
    return torch.stack(states, 3)


def fold_state(
    v: Tensor,
    phi_k: Tensor,
    config: HybridConfig,
    length: Tensor,
    initial_state: tuple[Tensor, Tensor] | None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S [B, Hs, E, D] and z [B, Hs, E] of what the last token of each right-padded sequence sees linearly.

    Args:
        v: [B, T, Hk, D]; `phi_k` of `chunked_forward`.
        length: [B], real tokens of each row.
        initial_state: S and z of the tokens before the first column. `decay`: of `HybridWeights`.
    """
    count = folded_tokens(length, config.window, config.window_size)[:, None]
    column = torch.arange(v.shape[1], device=v.device)[None, :]
    fold = column < count
    features = phi_k.flatten(1, 2).flatten(2, 3)[:, :, : v.shape[1]] * fold[:, None, :, None].to(phi_k.dtype)
    values = v.transpose(1, 2).repeat_interleave(features.shape[1] // v.shape[2], 1)
    if decay is not None:
        by_head = decay.to(v.dtype)[:, None]
        features = features * (by_head ** (count - column).clamp(min=0)[:, None])[..., None]
        if initial_state is not None:
            gone = by_head[:, 0] ** count
            initial_state = initial_state[0] * gone[..., None, None], initial_state[1] * gone[..., None]
    s, z = features.mT @ values, features.sum(-2)
    return (s, z) if initial_state is None else (initial_state[0] + s, initial_state[1] + z)

"""Kernels of one decoding step: constant state, updated in place, every sequence at its own position.

Two launches. `window_kernel` does what needs the ring: a program per sequence and key/value head attends the window for
its whole group of query heads on tensor cores; further programs compute the features of the queries of some sequences,
or of the tokens that leave, or fold the chunks that have left the window: of some sequences each, since all programs of
a kernel get the registers of the largest, and many small ones would wait for each other. `state_kernel` streams S once,
adds what leaves and finishes the output.

Positions stand in device memory and nothing depends on the host, so a step can be captured in a CUDA graph. Every
piece of state is written by one program, after the last launch in which another reads it.

# B batch, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns, C window, R ring slots
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import FEATURE_MAPS
from lolcats_kernels.hybrid_attention.fused.features import (
    LOG2E,
    NO_WINDOW,
    TERRACED,
    activation,
    softcapped,
)
from lolcats_kernels.hybrid_attention.state import HybridState

# Rows of the smallest product on tensor cores: query heads of a group are padded to it.
GROUP_ROWS = 16
# Sequences whose features one program computes: a map is read once for all of them.
SEQUENCES = 16
# Numbers of the state per warp of the kernel that streams it; with twice as many warps half as many programs fit.
STATE_PER_WARP = 2048


@triton.jit
def load_square(W, head, of, od, D: tl.constexpr, F: tl.constexpr):
    """[DB, FB] map of one head from [heads, D, F]."""
    inside = (od < D)[:, None] & (of < F)[None, :]
    return tl.load(W + head * D * F + od[:, None] * F + of[None, :], mask=inside, other=0.0)


@triton.jit
def store_features(x, W, B, head, OUT, factor, inside, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr,
                   FB: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr, FLOOR: tl.constexpr,
                   BIASED: tl.constexpr):  # fmt: skip
    """phi of one token of some sequences x [N, DB], times `factor` [N], to OUT [N] + [HALVES F] where `inside`."""
    of = tl.arange(0, FB)
    # Rounded like the operands of the chunked kernels.
    product = tl.dot(x, load_square(W, head, of, tl.arange(0, DB), D, F).to(x.dtype), input_precision="tf32x3")
    if BIASED:
        product += tl.load(B + head * F + of, mask=of < F, other=0.0).to(tl.float32)[None, :]
    for half in tl.static_range(HALVES):
        phi = activation(product * (1.0 - 2.0 * half), of, ACT, FLOOR, F, FB) * factor[:, None]
        tl.store(OUT[:, None] + half * F + of[None, :], phi, mask=inside[:, None] & (of < F)[None, :])


@triton.jit
def ring_tile(
    q, RING_K, RING_V, slots, seen, stride, scale, cap, D: tl.constexpr, DB: tl.constexpr, CAPPED: tl.constexpr
):
    """Scores [G, C] in units of log2 and values [C, DB] of C slots."""
    od = tl.arange(0, DB)
    inside = seen[:, None] & (od < D)[None, :]
    k = tl.load(RING_K + slots[:, None] * stride + od[None, :], mask=inside, other=0.0)
    v = tl.load(RING_V + slots[:, None] * stride + od[None, :], mask=inside, other=0.0)
    score = softcapped(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale, cap, CAPPED) * LOG2E
    return tl.where(seen[None, :], score, float("-inf")), v


@triton.jit
def fold_chunk(RING_K, RING_V, stride, W, B, head, half, S, Z, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr,
               FB: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, FLOOR: tl.constexpr,
               BIASED: tl.constexpr):  # fmt: skip
    """Add C tokens of the ring to one half of a head's state, S [F, D] and Z [F].

    Few tokens at a time: this happens once in C steps, and what it needs is taken from the programs of all steps.
    """
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    matrix = (of < F)[:, None] & (od < D)[None, :]
    place = S + of[:, None] * D + od[None, :]
    s = tl.load(place, mask=matrix, other=0.0)
    z = tl.load(Z + of, mask=of < F, other=0.0)
    for first in range(0, C, 16):
        token = (first + tl.arange(0, 16))[:, None] * stride + od[None, :]
        k = tl.load(RING_K + token, mask=(od < D)[None, :], other=0.0)
        v = tl.load(RING_V + token, mask=(od < D)[None, :], other=0.0)
        x = tl.dot(k, load_square(W, head, of, od, D, F).to(k.dtype), input_precision="tf32x3")
        if BIASED:
            x += tl.load(B + head * F + of, mask=of < F, other=0.0).to(tl.float32)[None, :]
        phi = activation(x * (1.0 - 2.0 * half), of, ACT, FLOOR, F, FB)
        s = tl.dot(tl.trans(phi.to(v.dtype)), v, s, input_precision="tf32x3")
        z += tl.sum(phi, 0)
    tl.store(place, s, mask=matrix)
    tl.store(Z + of, z, mask=of < F)


@triton.jit
def attend_ring(
    Q, K, V, GAMMA, RING_K, RING_V, LENGTH, WINDOW_SUM, WINDOW_DEN, sequence, hk, scale, cap,
    q_b, q_h, k_b, k_h, v_b, v_h,
    H: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The window's sum and denominator of the query heads that share one key/value head."""
    b = sequence.to(tl.int64)
    position = tl.load(LENGTH + b)
    od = tl.arange(0, DB)
    in_d = od < D
    GROUP: tl.constexpr = H // HK
    oc = tl.arange(0, C)
    og = tl.arange(0, G)
    slot = (position % R).to(tl.int32)
    ring_k = RING_K + (b * R * HK + hk) * D
    ring_v = RING_V + (b * R * HK + hk) * D
    heads = hk * GROUP + og
    in_group = og < GROUP
    inside = in_group[:, None] & in_d[None, :]
    q = tl.load(Q + b * q_b + heads[:, None] * q_h + od[None, :], mask=inside, other=0.0)
    gamma = tl.load(GAMMA + heads, mask=in_group, other=0.0)
    k_new = tl.load(K + b * k_b + hk * k_h + od, mask=in_d, other=0.0)
    v_new = tl.load(V + b * v_b + hk * v_h + od, mask=in_d, other=0.0)
    own = softcapped(tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale, cap, CAPPED) * LOG2E
    seen = (oc <= position) & (oc != slot)
    if WINDOW == TERRACED:
        begun = slot // C * C
        # The own chunk so far, then the whole previous one.
        seen = begun + oc < slot
        score, v = ring_tile(q, ring_k, ring_v, begun + oc, seen, HK * D, scale, cap, D, DB, CAPPED)
        other = oc < tl.where(position >= C, C, 0)
        score_b, v_b_tile = ring_tile(q, ring_k, ring_v, C - begun + oc, other, HK * D, scale, cap, D, DB, CAPPED)
        top = tl.maximum(own, tl.maximum(tl.max(score, 1), tl.max(score_b, 1)))
    else:
        score, v = ring_tile(q, ring_k, ring_v, oc, seen, HK * D, scale, cap, D, DB, CAPPED)
        top = tl.maximum(own, tl.max(score, 1))
    weight = gamma[:, None] * tl.exp2(score - top[:, None])
    own = gamma * tl.exp2(own - top)
    den = own + tl.sum(weight, 1)
    acc = own[:, None] * v_new.to(tl.float32)[None, :]
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="tf32x3")
    if WINDOW == TERRACED:
        weight = gamma[:, None] * tl.exp2(score_b - top[:, None])
        den += tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v_b_tile, acc, input_precision="tf32x3")
    tl.store(WINDOW_SUM + (b * H + heads)[:, None] * D + od[None, :], acc, mask=inside)
    tl.store(WINDOW_DEN + b * H + heads, den, mask=in_group)


@triton.jit
def window_kernel(
    Q, K, V, WQ, WK, BQ, BK, GAMMA, ALPHA, S, Z, RING_K, RING_V, LENGTH,
    POSITION, WINDOW_SUM, WINDOW_DEN, PHI, LEAVING, LEAVING_V, batch, scale, cap,
    q_b, q_h, k_b, k_h, v_b, v_h,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    F: tl.constexpr, FB: tl.constexpr, C: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, ACT: tl.constexpr,
    HALVES: tl.constexpr, FLOOR: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Four kinds of programs, each for one head; the first serves one sequence, the others N of them.

    HK B: WINDOW_SUM [B, H, D] and WINDOW_DEN [B, H]. H B/N: PHI [B, H, E], alpha phi(q). Then, terraced, HS HALVES B/N
    that fold chunks into S and Z where one is due; otherwise HS B/N: LEAVING [B, HS, E], phi of the token that joins
    the state in this step (zeros if none does), and LEAVING_V [B, Hk, D].
    """
    role = tl.program_id(0) - HK * batch
    od = tl.arange(0, DB)
    in_d = od < D
    E: tl.constexpr = HALVES * F
    if role >= 0:
        block = role % tl.cdiv(batch, N)
        role = role // tl.cdiv(batch, N)
        b = (block * N + tl.arange(0, N)).to(tl.int64)
        inside = b < batch
        position = tl.load(LENGTH + b, mask=inside, other=0)
        of_new = inside[:, None] & in_d[None, :]
        if role < H:
            if role == 0:
                tl.store(POSITION + b, position, mask=inside)
            q = tl.load(Q + b[:, None] * q_b + role * q_h + od[None, :], mask=of_new, other=0.0)
            factor = tl.zeros([N], tl.float32) + tl.load(ALPHA + role)
            out = PHI + (b * H + role) * E
            store_features(q, WQ, BQ, role, out, factor, inside, D, DB, F, FB, ACT, HALVES, FLOOR, BIASED)
        elif WINDOW == TERRACED:
            # A chunk begins: the one before the previous leaves every window. Its first slot is the new token's.
            due = inside & (position % C == 0) & (position >= 2 * C)
            if tl.max(due.to(tl.int32), 0) > 0:
                head = (role - H) // HALVES
                half = (role - H) % HALVES
                for i in range(N):
                    b_due = (block * N + i).to(tl.int64)
                    at = tl.load(LENGTH + b_due, mask=b_due < batch, other=1)
                    if (at % C == 0) & (at >= 2 * C):
                        first = ((b_due * R + at % R) * HK + head // (HS // HK)) * D
                        state = (b_due * HS + head) * E + half * F
                        fold_chunk(
                            RING_K + first, RING_V + first, HK * D, WK, BK, head, half, S + state * D, Z + state,
                            D, DB, F, FB, C, ACT, FLOOR, BIASED,
                        )  # fmt: skip
        else:
            hs = role - H
            hk = hs // (HS // HK)
            if WINDOW == NO_WINDOW:
                # A token sees itself through the state.
                k_old = tl.load(K + b[:, None] * k_b + hk * k_h + od[None, :], mask=of_new, other=0.0)
                v_old = tl.load(V + b[:, None] * v_b + hk * v_h + od[None, :], mask=of_new, other=0.0)
                joins = tl.full([N], 1.0, tl.float32)
            else:
                place = (((b * R + position % C) * HK + hk) * D)[:, None] + od[None, :]
                k_old = tl.load(RING_K + place, mask=of_new, other=0.0)
                v_old = tl.load(RING_V + place, mask=of_new, other=0.0)
                joins = tl.where(position >= C, 1.0, 0.0)
            out = LEAVING + (b * HS + hs) * E
            store_features(k_old, WK, BK, hs, out, joins, inside, D, DB, F, FB, ACT, HALVES, FLOOR, BIASED)
            if hs % (HS // HK) == 0:
                tl.store(LEAVING_V + ((b * HK + hk) * D)[:, None] + od[None, :], v_old, mask=of_new)
    elif WINDOW != NO_WINDOW:
        attend_ring(
            Q, K, V, GAMMA, RING_K, RING_V, LENGTH, WINDOW_SUM, WINDOW_DEN, tl.program_id(0) // HK,
            tl.program_id(0) % HK, scale, cap, q_b, q_h, k_b, k_h, v_b, v_h, H, HK, G, D, DB, C, R, WINDOW, CAPPED,
        )  # fmt: skip


@triton.jit
def state_kernel(
    K, V, S, Z, RING_K, RING_V, LENGTH, POSITION, WINDOW_SUM, WINDOW_DEN, PHI, LEAVING, LEAVING_V, Y,
    k_b, k_h, v_b, v_h,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    F: tl.constexpr, FB: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Y [B, H, D] of the query heads that share one state head; the ring and the position move on."""
    hs = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    hk = hs // (HS // HK)
    SHARED: tl.constexpr = H // HS
    E: tl.constexpr = HALVES * F
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    in_d = od < D
    in_f = of < F
    matrix = in_f[:, None] & in_d[None, :]
    position = tl.load(POSITION + b)
    s_base = S + (b * HS + hs) * E * D + of[:, None] * D + od[None, :]
    z_base = Z + (b * HS + hs) * E + of
    if WINDOW != TERRACED:
        leaving_v = tl.load(LEAVING_V + (b * HK + hk) * D + od, mask=in_d, other=0.0).to(tl.float32)
    if SHARED > 1:
        heads = hs * SHARED + tl.arange(0, G)
        in_group = tl.arange(0, G) < SHARED
        acc = tl.zeros([G, DB], tl.float32)
        den = tl.full([G], 1e-12 if WINDOW == NO_WINDOW else 0.0, tl.float32)
    else:
        heads = hs
        acc = tl.zeros([FB, DB], tl.float32)
        den = 1e-12 if WINDOW == NO_WINDOW else 0.0
    for half in tl.static_range(HALVES):
        s = tl.load(s_base + half * F * D, mask=matrix, other=0.0)
        z = tl.load(z_base + half * F, mask=in_f, other=0.0)
        if WINDOW != TERRACED:
            phi = tl.load(LEAVING + (b * HS + hs) * E + half * F + of, mask=in_f, other=0.0)
            s += phi[:, None] * leaving_v[None, :]
            z += phi
            tl.store(s_base + half * F * D, s, mask=matrix)
            tl.store(z_base + half * F, z, mask=in_f)
        if SHARED > 1:
            inside = in_group[:, None] & in_f[None, :]
            query = tl.load(PHI + (b * H + heads)[:, None] * E + half * F + of[None, :], mask=inside, other=0.0)
            acc = tl.dot(query, s, acc, input_precision="tf32x3")
            den += tl.sum(query * z[None, :], 1)
        else:
            query = tl.load(PHI + (b * H + heads) * E + half * F + of, mask=in_f, other=0.0)
            acc += query[:, None] * s
            den += tl.sum(query * z, 0)
    if SHARED > 1:
        inside = in_group[:, None] & in_d[None, :]
        place = (b * H + heads)[:, None] * D + od[None, :]
        if WINDOW != NO_WINDOW:
            acc += tl.load(WINDOW_SUM + place, mask=inside, other=0.0)
            den += tl.load(WINDOW_DEN + b * H + heads, mask=in_group, other=1.0)
        tl.store(Y + place, (acc / den[:, None]).to(Y.dtype.element_ty), mask=inside)
    else:
        total = tl.sum(acc, 0)
        place = (b * H + heads) * D + od
        if WINDOW != NO_WINDOW:
            total += tl.load(WINDOW_SUM + place, mask=in_d, other=0.0)
            den += tl.load(WINDOW_DEN + b * H + heads)
        tl.store(Y + place, (total / den).to(Y.dtype.element_ty), mask=in_d)
    if WINDOW != NO_WINDOW:
        if hs % (HS // HK) == 0:
            slot = ((b * R + position % R) * HK + hk) * D + od
            tl.store(RING_K + slot, tl.load(K + b * k_b + hk * k_h + od, mask=in_d, other=0.0), mask=in_d)
            tl.store(RING_V + slot, tl.load(V + b * v_b + hk * v_h + od, mask=in_d, other=0.0), mask=in_d)
    if hs == 0:
        tl.store(LENGTH + b, position + 1)


def decode(q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig, state: HybridState) -> Tensor:
    """y [B, 1, H, D] of one new token of each sequence; `state` is updated in place.

    Args:
        q: [B, 1, H, D]; `k`, `v`: [B, 1, Hk, D].
    """
    batch, _, heads, dim = q.shape
    key_heads, state_heads, columns = k.shape[2], weights.w_k.shape[0], weights.w_q.shape[-1]
    feature_map = FEATURE_MAPS[config.feature_map]
    halves = feature_map.halves
    terraced, window = config.window == "terraced", 16 if config.window == "none" else config.window_size
    dtype = q.dtype
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k.to(dtype), v.to(dtype)))
    w_q, w_k = weights.w_q.contiguous(), weights.w_k.contiguous()
    gamma, alpha = weights.window_factor, weights.linear_factor_or_ones()
    b_q, b_k = (gamma if b is None else b for b in (weights.b_q, weights.b_k))

    def scratch(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=q.device)

    y = torch.empty(batch, 1, heads, dim, dtype=dtype, device=q.device)
    position = torch.empty_like(state.length)
    passed = (
        position, scratch(heads, dim), scratch(heads), scratch(heads, halves * columns),
        scratch(state_heads, halves * columns), scratch(key_heads, dim),
    )  # fmt: skip
    shape = {
        "H": heads,
        "HK": key_heads,
        "HS": state_heads,
        "D": dim,
        "DB": triton.next_power_of_2(dim),
        "F": columns,
        "FB": max(16, triton.next_power_of_2(columns)),
        "R": window * (2 if terraced else 1),
        "WINDOW": config.window,
        "HALVES": halves,
    }
    of_new = (k.stride(0), k.stride(2), v.stride(0), v.stride(2))
    blocks = (heads + state_heads * (halves if terraced else 1)) * triton.cdiv(batch, SEQUENCES)
    window_kernel[(key_heads * batch + blocks,)](
        q, k, v, w_q, w_k, b_q, b_k, gamma, alpha, state.s, state.z, state.ring_k, state.ring_v,
        state.length, *passed, batch, config.scale, config.softcap or 0.0, q.stride(0), q.stride(2), *of_new, **shape,
        G=max(GROUP_ROWS, triton.next_power_of_2(heads // key_heads)), C=window, ACT=feature_map.fused_code,
        FLOOR=config.window == "none", BIASED=weights.b_q is not None, CAPPED=config.softcap is not None, N=SEQUENCES,
        num_warps=4,
    )  # fmt: skip
    warps = min(16, max(4, shape["DB"] * shape["FB"] // STATE_PER_WARP))
    state_kernel[(state_heads, batch)](
        k, v, state.s, state.z, state.ring_k, state.ring_v, state.length, *passed, y, *of_new, **shape,
        G=max(GROUP_ROWS, triton.next_power_of_2(heads // state_heads)), num_warps=warps,
    )  # fmt: skip
    return y

"""Kernels that sum over the past and over the future: states before each chunk, and their mirror for gradients.

The state a chunk's queries see sums the key chunks at least LAG before it (2 behind a window, 1 without); its gradient
sums the query chunks at least LAG after a key chunk. Both run over the chunks of a segment in order. A sequence of
several segments takes two passes: sums of each segment, then the states, which begin with the sums of the other
segments before (after) their own.

States by chunk are stored as [slots Hs HALVES FB, D], sums of segments and whole states as [M or n, Hs, HALVES FB, DB].

# M segments, C chunk size, D value dim (DB: next power of two), F columns of a map (FB likewise), Hs heads of the state
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats_kernels.hybrid_attention.fused.features import (
    SLIDING,
    TERRACED,
    activation,
    load_bias,
    load_map,
    load_segment,
    load_tile,
)


@triton.jit
def states_kernel(
    K, V, W, B, INITIAL, INITIAL_Z, SUMS, SUMS_Z, STATES, STATES_Z, FINAL, FINAL_Z, TABLE, BOUNDS,
    HS: tl.constexpr, PER_KEY: tl.constexpr, DB: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
    C: tl.constexpr, LAG: tl.constexpr, WINDOW: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    FLOOR: tl.constexpr, BIASED: tl.constexpr, STORE: tl.constexpr, SPLIT: tl.constexpr,
    CONTINUED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """S = sum of phi(k) v^T and z = sum of phi(k), one half of the features and BV values per program.

    STORE: write the state before each chunk to STATES and STATES_Z; otherwise only each segment's own sum, to SUMS.
    SPLIT: add the SUMS of the sequence's earlier segments, BOUNDS [n + 1]. CONTINUED: begin with
    INITIAL [n, Hs, E, DB]. ENDS: write the state that the last token sees to FINAL [n, Hs, E, DB].
    PER_KEY: state heads per key/value head.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    half = tl.program_id(2) % HALVES
    block = tl.program_id(2) // HALVES
    row, start, length, c0, c1, slot, sequence, last = load_segment(TABLE, segment)
    hk = head // PER_KEY
    of = tl.arange(0, FB)
    ov = block * BV + tl.arange(0, BV)
    oc = tl.arange(0, C)
    within = of[:, None] * DB + ov[None, :]
    # Every column of z is the same sum: a product with ones is cheaper than a sum across warps.
    columns = tl.arange(0, 16)[None, :]
    of16 = tl.broadcast_to(of[:, None], (FB, 16))
    once = (columns == block) & (of16 >= 0)
    ones = tl.full([C, 16], 1.0, V.dtype)
    w = load_map(W, head, DB, FB)
    sign = 1.0 - 2.0 * half
    own = (head * HALVES + half) * FB
    rows = HS * HALVES * FB
    s = tl.zeros([FB, BV], tl.float32)
    z = tl.zeros([FB, 16], tl.float32)
    if CONTINUED and STORE:
        s += tl.load(INITIAL + (sequence * rows + own) * DB + within)
        z += tl.load(INITIAL_Z + sequence * rows + own + of16)
    if SPLIT and STORE:
        begin = tl.load(BOUNDS + sequence)
        for i in range(0, segment - begin):
            place = (begin + i).to(tl.int64) * rows + own
            s += tl.load(SUMS + place * DB + within)
            z += tl.load(SUMS_Z + place + of16)
    # Tokens outside the window of the last one.
    folded = length
    if WINDOW == TERRACED:
        folded = C * ((length - 1) // C - 1)
    elif WINDOW == SLIDING:
        folded = length - C
    for c in range(c0, c1):
        if STORE:
            place = (slot + c) * rows + own
            STATES.store([place, block * BV], s.to(STATES.dtype))
            tl.store(STATES_Z + place + of16, z, mask=once)
        first = (c + 1 - LAG) * C
        k = load_tile(K, row, start + first, hk, C, DB)
        v = V.load([row, start + first, hk, block * BV]).reshape(C, BV)
        x = tl.dot(k, w, input_precision="tf32x3")
        if BIASED:
            x += load_bias(B, head, of, FB)[None, :]
        # Masked after the map: phi(0) is not 0.
        phi = activation(x * sign, of, ACT, FLOOR, F, FB)
        phi = tl.where(((first + oc >= 0) & (first + oc < folded))[:, None], phi, 0.0)
        phi = tl.trans(phi.to(v.dtype))
        s = tl.dot(phi, v, s, input_precision="tf32x3")
        z = tl.dot(phi, ones, z, input_precision="tf32x3")
    if not STORE:
        place = segment.to(tl.int64) * rows + own
        tl.store(SUMS + place * DB + within, s)
        tl.store(SUMS_Z + place + of16, z, mask=once)
    if ENDS and STORE:
        if last > 0:
            place = sequence * rows + own
            tl.store(FINAL + place * DB + within, s)
            tl.store(FINAL_Z + place + of16, z, mask=once)


@triton.jit
def reverse_states_kernel(
    Q, W, B, GRAD, DEN, DELTA, ALPHA, SUMS, SUMS_Z, STATES, STATES_Z, TABLE, BOUNDS, T,
    H: tl.constexpr, HS: tl.constexpr, DB: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
    C: tl.constexpr, LAG: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr, FLOOR: tl.constexpr,
    BIASED: tl.constexpr, STORE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradient of the state that a chunk's keys were added to: sums of alpha phi(q) [g, -e]^T over later queries.

    g = GRAD / DEN and e = DELTA / DEN, with DEN, DELTA [B, H, T]; the heads of a group that share a state are added.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    half = tl.program_id(2) % HALVES
    block = tl.program_id(2) // HALVES
    row, start, length, c0, c1, slot, sequence, _ = load_segment(TABLE, segment)
    GROUP: tl.constexpr = H // HS
    of = tl.arange(0, FB)
    ov = block * BV + tl.arange(0, BV)
    oc = tl.arange(0, C)
    within = of[:, None] * DB + ov[None, :]
    columns = tl.arange(0, 16)[None, :]
    of16 = tl.broadcast_to(of[:, None], (FB, 16))
    once = (columns == block) & (of16 >= 0)
    sign = 1.0 - 2.0 * half
    own = (head * HALVES + half) * FB
    rows = HS * HALVES * FB
    s = tl.zeros([FB, BV], tl.float32)
    z = tl.zeros([FB, 16], tl.float32)
    if SPLIT and STORE:
        end = tl.load(BOUNDS + sequence + 1)
        for i in range(0, end - segment - 1):
            place = (end - 1 - i).to(tl.int64) * rows + own
            s += tl.load(SUMS + place * DB + within)
            z += tl.load(SUMS_Z + place + of16)
    for i in range(0, c1 - c0):
        c = c1 - 1 - i
        if STORE:
            place = (slot + c) * rows + own
            STATES.store([place, block * BV], s.to(STATES.dtype))
            tl.store(STATES_Z + place + of16, z, mask=once)
        first = (c + LAG - 1) * C
        inside = first + oc < length
        for member in range(0, GROUP):
            h = head * GROUP + member
            w = load_map(W, h, DB, FB)
            q = load_tile(Q, row, start + first, h, C, DB)
            g = GRAD.load([row, start + first, h, block * BV]).reshape(C, BV)
            per_token = (row.to(tl.int64) * H + h) * T + start + first + oc
            alpha = tl.load(ALPHA + h)
            den = tl.load(DEN + per_token, mask=inside, other=1.0)
            e = -tl.load(DELTA + per_token, mask=inside, other=0.0)
            x = tl.dot(q, w, input_precision="tf32x3")
            if BIASED:
                x += load_bias(B, h, of, FB)[None, :]
            # Over the denominator here, so that the gradient's tile goes into the product as it is.
            phi = activation(x * sign, of, ACT, FLOOR, F, FB) * (alpha / den)[:, None]
            phi = tl.trans(tl.where(inside[:, None], phi, 0.0).to(q.dtype))
            e = tl.broadcast_to(e[:, None], (C, 16)).to(q.dtype)
            s = tl.dot(phi, g, s, input_precision="tf32x3")
            z = tl.dot(phi, e, z, input_precision="tf32x3")
    if not STORE:
        place = segment.to(tl.int64) * rows + own
        tl.store(SUMS + place * DB + within, s)
        tl.store(SUMS_Z + place + of16, z, mask=once)

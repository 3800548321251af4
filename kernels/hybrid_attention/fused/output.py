"""Kernel of the outputs, given the state before each chunk; in attention transfer also of the loss and its gradients.

# B batch, T tokens, C chunk size, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns
"""

from __future__ import annotations

import triton
import triton.language as tl

from lolcats_kernels.hybrid_attention.fused.features import (
    NO_WINDOW,
    SLIDING,
    TERRACED,
    activation,
    activation_grad,
    load_bias,
    load_map,
    load_segment,
    load_tile,
    store_tile,
    window_scores,
)


@triton.jit
def output_kernel(
    Q, K, V, WQ, WK, BQ, BK, GAMMA, ALPHA, STATES, STATES_Z, Y, TABLE,
    TARGET, DEN, DELTA, LOSS,
    scale, cap, T,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    FLOOR: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, TRANSFER: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Y [B, T, H, D] of one query head and one segment; with GRADIENTS also its denominators DEN [B, H, T].

    TRANSFER: the sum of squares of y - TARGET goes to LOSS [M, H] instead; with GRADIENTS the errors take the place
    of Y, and DELTA [B, H, T] is their product with it.
    """
    h = tl.program_id(0)
    segment = tl.program_id(1)
    row, start, length, c0, c1, slot, _, _ = load_segment(TABLE, segment)
    hk = h // (H // HK)
    hs = h // (H // HS)
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    oc = tl.arange(0, C)
    gamma = tl.load(GAMMA + h)
    alpha = tl.load(ALPHA + h)
    wq = load_map(WQ, h, DB, FB)
    if WINDOW != TERRACED:
        wk = load_map(WK, hs, DB, FB)
    y_base = Y + ((row.to(tl.int64) * T + start) * H + h) * D
    loss = tl.zeros([C], tl.float32)
    for c in range(c0, c1):
        position = c * C + oc
        inside = position < length
        q = load_tile(Q, row, start + c * C, h, C, DB)
        # The window first: its scores are gone from the registers before the features come. Tiles are loaded where they
        # are used, so that as few as possible are in shared memory together.
        if WINDOW != NO_WINDOW:
            k = load_tile(K, row, start + c * C, hk, C, DB)
            k_previous = load_tile(K, row, start + c * C - C, hk, C, DB)
            own, previous = window_scores(q, k, k_previous, c, scale, cap, C, WINDOW, CAPPED)
            top = tl.maximum(tl.max(own, 1), tl.max(previous, 1))
            own = gamma * tl.exp2(own - top[:, None])
            previous = gamma * tl.exp2(previous - top[:, None])
            den = tl.sum(own, 1) + tl.sum(previous, 1)
            v = load_tile(V, row, start + c * C, hk, C, DB)
            acc = tl.dot(own.to(q.dtype), v, input_precision="tf32x3")
            v_previous = load_tile(V, row, start + c * C - C, hk, C, DB)
            acc = tl.dot(previous.to(q.dtype), v_previous, acc, input_precision="tf32x3")
        else:
            den = tl.full([C], 1e-12, tl.float32)
            acc = tl.zeros([C, DB], tl.float32)
        x = tl.dot(q, wq, input_precision="tf32x3")
        if BIASED:
            x += load_bias(BQ, h, of, FB)[None, :]
        place = ((slot + c) * HS + hs) * HALVES * FB
        sp = STATES.load([place, 0])
        zp = tl.load(STATES_Z + place + of)
        # Numerator, denominator and gradients take the same rounded features: where the linear part outweighs the
        # window, the gradients of its weight are small differences of large sums.
        weighted = (alpha * activation(x, of, ACT, FLOOR, F, FB)).to(q.dtype)
        den += tl.sum(weighted * zp[None, :], 1)
        acc = tl.dot(weighted, sp, acc, input_precision="tf32x3")
        if HALVES == 2:
            sn = STATES.load([place + FB, 0])
            zn = tl.load(STATES_Z + place + FB + of)
            weighted_n = (alpha * activation(-x, of, ACT, FLOOR, F, FB)).to(q.dtype)
            den += tl.sum(weighted_n * zn[None, :], 1)
            acc = tl.dot(weighted_n, sn, acc, input_precision="tf32x3")
        if WINDOW != TERRACED:
            # Pairs that are linear inside the two chunks: those that have left a sliding window, or all of them.
            if WINDOW == SLIDING:
                k_linear = k_previous
                v_linear = v_previous
            else:
                k_linear = load_tile(K, row, start + c * C, hk, C, DB)
                v_linear = load_tile(V, row, start + c * C, hk, C, DB)
            x_key = tl.dot(k_linear, wk, input_precision="tf32x3")
            if BIASED:
                x_key += load_bias(BK, hs, of, FB)[None, :]
            features = activation(x_key, of, ACT, FLOOR, F, FB).to(q.dtype)
            # tf32x3 with a transposed register tile reads past shared memory (Triton 3.6).
            pairs = tl.dot(weighted, tl.trans(features), input_precision="ieee")
            if HALVES == 2:
                features = activation(-x_key, of, ACT, FLOOR, F, FB).to(q.dtype)
                pairs = tl.dot(weighted_n, tl.trans(features), pairs, input_precision="ieee")
            pairs = tl.where((oc[None, :] <= oc[:, None]) & ((WINDOW == NO_WINDOW) | (c > 0)), pairs, 0.0)
            den += tl.sum(pairs, 1)
            acc = tl.dot(pairs.to(q.dtype), v_linear, acc, input_precision="tf32x3")
        y = acc * (1.0 / den)[:, None]
        per_token = (row.to(tl.int64) * H + h) * T + start + position
        if GRADIENTS:
            tl.store(DEN + per_token, den, mask=inside)
        if TRANSFER:
            target = load_tile(TARGET, row, start + c * C, h, C, DB)
            error = tl.where(inside[:, None], y - target.to(tl.float32), 0.0)
            loss += tl.sum(error * error, 1)
            if GRADIENTS:
                tl.store(DELTA + per_token, tl.sum(error * y, 1), mask=inside)
                store_tile(y_base, position, length, H * D, od, error, D, DB)
        else:
            store_tile(y_base, position, length, H * D, od, y, D, DB)
    if TRANSFER:
        tl.store(LOSS + segment.to(tl.int64) * H + h, tl.sum(loss))


@triton.jit
def map_gradient_kernel(
    X, OTHER, W, B, STATES, STATES_Z, DEN, DELTA, ALPHA, DW, DB_, EULER, TABLE, T,
    HEADS: tl.constexpr, PER_X: tl.constexpr, PER_STATE: tl.constexpr, QUERY: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    FLOOR: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Gradients of one side's maps in attention transfer, by segment: DW [M, heads, D, F] and DB_ [M, heads, F].

    QUERY: X is q, OTHER the errors, STATES those before each chunk, and EULER [M, H] = sum of phi_q . dphi_q.
    Otherwise X is k, OTHER is v and STATES are the reverse sums.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    row, start, length, c0, c1, slot, _, _ = load_segment(TABLE, segment)
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    oc = tl.arange(0, C)
    w = load_map(W, head, DB, FB)
    dw = tl.zeros([DB, FB], tl.float32)
    db = tl.zeros([FB], tl.float32)
    euler = tl.zeros([C], tl.float32)
    for c in range(c0, c1):
        position = c * C + oc
        inside = position < length
        x = load_tile(X, row, start + c * C, head // PER_X, C, DB)
        other = load_tile(OTHER, row, start + c * C, head // PER_X, C, DB)
        if QUERY:
            per_token = (row.to(tl.int64) * HEADS + head) * T + start + position
            alpha = tl.load(ALPHA + head)
            scaled = alpha / tl.load(DEN + per_token, mask=inside, other=1.0)
            z_factor = -scaled * tl.load(DELTA + per_token, mask=inside, other=0.0)
        else:
            scaled = tl.full([C], 1.0, tl.float32)
            z_factor = scaled
        product = tl.dot(x, w, input_precision="tf32x3")
        if BIASED:
            product += load_bias(B, head, of, FB)[None, :]
        place = ((slot + c) * (HEADS // PER_STATE) + head // PER_STATE) * HALVES * FB
        z = tl.load(STATES_Z + place + of)
        dp = tl.dot(other, tl.trans(STATES.load([place, 0])), input_precision="tf32x3") * scaled[:, None]
        dp += z_factor[:, None] * z[None, :]
        p = activation(product, of, ACT, FLOOR, F, FB).to(x.dtype)
        dx = activation_grad(p, dp, ACT)
        part = tl.sum(p * dp, 1)
        if HALVES == 2:
            z = tl.load(STATES_Z + place + FB + of)
            dp = tl.dot(other, tl.trans(STATES.load([place + FB, 0])), input_precision="tf32x3") * scaled[:, None]
            dp += z_factor[:, None] * z[None, :]
            p = activation(-product, of, ACT, FLOOR, F, FB).to(x.dtype)
            dx -= activation_grad(p, dp, ACT)
            part += tl.sum(p * dp, 1)
        if QUERY:
            euler += tl.where(inside, part, 0.0)
        dx = tl.where(inside[:, None], dx, 0.0)
        dw = tl.dot(tl.trans(x), dx.to(x.dtype), dw, input_precision="tf32x3")
        if BIASED:
            db += tl.sum(dx, 0)
    place = segment.to(tl.int64) * HEADS + head
    matrix = (od < D)[:, None] & (of < F)[None, :]
    tl.store(DW + place * D * F + od[:, None] * F + of[None, :], dw, mask=matrix)
    if BIASED:
        tl.store(DB_ + place * F + of, db, mask=of < F)
    if QUERY:
        tl.store(EULER + place, tl.sum(euler))

"""Kernels of the full backward pass: a query side (dq, and what each query is to its keys) and a key side (dk, dv).

Everything is recomputed from q, k, v, the saved output, its denominator DEN and the states; only per-token numbers go
from one side to the other: DELTA = dO . y, TOP the row maximum (log2), SUM = sum of dS over the window and ARGMAX its
place (0 ... C-1 previous chunk, C ... 2C-1 own chunk). The row maximum is part of the function, so -SUM belongs to the
score at ARGMAX. The output's gradient enters the products as it is, and 1 / DEN scales what comes out: a scaled copy
would have to be held in registers.

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
    load_rows,
    load_segment,
    load_tile,
    softcapped,
    store_tile,
    window_scores,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def cap_slope(s, cap, CAPPED: tl.constexpr):
    """d softcapped(x) / dx from the capped score in log2 units; masked scores are -inf and must come out as 1."""
    slope = 1.0
    if CAPPED:
        ratio = tl.where(s > float("-inf"), s, 0.0) * LN2 / cap
        slope = 1.0 - ratio * ratio
    return slope


@triton.jit
def query_gradient_kernel(
    Q, K, V, WQ, WK, BQ, BK, GAMMA, ALPHA, STATES, STATES_Z, Y, GRAD, TABLE,
    DQ, DXQ, DEN, DELTA, TOP, SUM, ARGMAX, EULER, DBQ,
    scale, cap, T,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    FLOOR: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """DQ [B, T, H, D] and per-token numbers [B, H, T]; with MAPS also DXQ [B, T, H, F], EULER and DBQ by segment."""
    h = tl.program_id(0)
    segment = tl.program_id(1)
    row, start, length, c, c1, slot, _, _ = load_segment(TABLE, segment)
    hk = h // (H // HK)
    hs = h // (H // HS)
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    oc = tl.arange(0, C)
    gamma = tl.load(GAMMA + h)
    alpha = tl.load(ALPHA + h)
    wq = load_map(WQ, h, DB, FB)
    if c < c1:
        position = c * C + oc
        inside = position < length
        per_token = (row.to(tl.int64) * H + h) * T + start + position
        y = load_tile(Y, row, start + c * C, h, C, DB)
        grad = load_tile(GRAD, row, start + c * C, h, C, DB)
        delta = tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(DELTA + per_token, delta, mask=inside)
        inverse = tl.where(inside, 1.0 / tl.load(DEN + per_token, mask=inside, other=1.0), 0.0)
        q = load_tile(Q, row, start + c * C, h, C, DB)
        k = load_tile(K, row, start + c * C, hk, C, DB)
        v = load_tile(V, row, start + c * C, hk, C, DB)
        dq = tl.zeros([C, DB], tl.float32)
        if WINDOW != NO_WINDOW:
            k_previous = load_tile(K, row, start + c * C - C, hk, C, DB)
            v_previous = load_tile(V, row, start + c * C - C, hk, C, DB)
            own, previous = window_scores(q, k, k_previous, c, scale, cap, C, WINDOW, CAPPED)
            top = tl.maximum(tl.max(own, 1), tl.max(previous, 1))
            first_previous = tl.min(tl.where(previous == top[:, None], oc[None, :], 2 * C), 1)
            first_own = tl.min(tl.where(own == top[:, None], C + oc[None, :], 2 * C), 1)
            argmax = tl.minimum(first_previous, first_own)
            own_slope = cap_slope(own, cap, CAPPED)
            previous_slope = cap_slope(previous, cap, CAPPED)
            weight = gamma * inverse
            own = weight[:, None] * tl.exp2(own - top[:, None])
            previous = weight[:, None] * tl.exp2(previous - top[:, None])
            own = own * (tl.dot(grad, tl.trans(v), input_precision="tf32x3") - delta[:, None])
            previous = previous * (tl.dot(grad, tl.trans(v_previous), input_precision="tf32x3") - delta[:, None])
            total = tl.sum(own, 1) + tl.sum(previous, 1)
            tl.store(TOP + per_token, top, mask=inside)
            tl.store(SUM + per_token, total, mask=inside)
            tl.store(ARGMAX + per_token, argmax, mask=inside)
            own = tl.where(C + oc[None, :] == argmax[:, None], own - total[:, None], own) * own_slope
            previous = tl.where(oc[None, :] == argmax[:, None], previous - total[:, None], previous) * previous_slope
            dq = tl.dot((own * scale).to(q.dtype), k, dq, input_precision="tf32x3")
            dq = tl.dot((previous * scale).to(q.dtype), k_previous, dq, input_precision="tf32x3")
        # The linear part after the window, whose tiles are gone from the registers by then.
        if WINDOW != TERRACED:
            wk = load_map(WK, hs, DB, FB)
            k_linear = k
            v_linear = v
            if WINDOW == SLIDING:
                k_linear = k_previous
                v_linear = v_previous
            x_key = tl.dot(k_linear, wk, input_precision="tf32x3")
            if BIASED:
                x_key += load_bias(BK, hs, of, FB)[None, :]
            seen = (oc[None, :] <= oc[:, None]) & ((WINDOW == NO_WINDOW) | (c > 0))
            d_pairs = tl.dot(grad, tl.trans(v_linear), input_precision="tf32x3") - delta[:, None]
            d_pairs = tl.where(seen, d_pairs, 0.0).to(q.dtype)
        x = tl.dot(q, wq, input_precision="tf32x3")
        if BIASED:
            x += load_bias(BQ, h, of, FB)[None, :]
        place = ((slot + c) * HS + hs) * HALVES * FB
        z = tl.load(STATES_Z + place + of)
        dp = tl.dot(grad, tl.trans(STATES.load([place, 0])), input_precision="tf32x3") - delta[:, None] * z[None, :]
        if WINDOW != TERRACED:
            features = activation(x_key, of, ACT, FLOOR, F, FB).to(q.dtype)
            dp = tl.dot(d_pairs, features, dp, input_precision="tf32x3")
        p = activation(x, of, ACT, FLOOR, F, FB).to(q.dtype)
        dx = activation_grad(p, dp, ACT)
        part = tl.sum(p * dp, 1)
        if HALVES == 2:
            z = tl.load(STATES_Z + place + FB + of)
            dp = tl.dot(grad, tl.trans(STATES.load([place + FB, 0])), input_precision="tf32x3")
            dp -= delta[:, None] * z[None, :]
            if WINDOW != TERRACED:
                features = activation(-x_key, of, ACT, FLOOR, F, FB).to(q.dtype)
                dp = tl.dot(d_pairs, features, dp, input_precision="tf32x3")
            p = activation(-x, of, ACT, FLOOR, F, FB).to(q.dtype)
            dx -= activation_grad(p, dp, ACT)
            part += tl.sum(p * dp, 1)
        factor = alpha * inverse
        dx = dx * factor[:, None]
        if MAPS:
            summed = segment.to(tl.int64) * H + h
            tl.store(EULER + summed, tl.sum(tl.where(inside, factor * part, 0.0)))
            if BIASED:
                tl.store(DBQ + summed * F + of, tl.sum(dx, 0), mask=of < F)
            token = DXQ + (row.to(tl.int64) * T + start) * H * F + h * F
            store_tile(token, position, length, H * F, of, dx, F, FB)
        dq = tl.dot(dx.to(q.dtype), tl.trans(wq), dq, input_precision="tf32x3")
        store_tile(DQ + (row.to(tl.int64) * T + start) * H * D + h * D, position, length, H * D, od, dq, D, DB)


@triton.jit
def key_gradient_kernel(
    Q, K, V, WQ, WK, BQ, BK, GAMMA, ALPHA, STATES, STATES_Z, GRAD, TABLE,
    DK, DV, DXK, DEN, DELTA, TOP, SUM, ARGMAX, DBK,
    scale, cap, T, k_strides, v_strides,
    H: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    FLOOR: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """DK, DV [B, T, Hk, D] of one key/value head and one chunk (segments of one chunk); the query heads of the group
    are added here. STATES hold the reverse sums. With MAPS also DXK [B, T, Hs, F] and DBK [M, Hs, F].
    """
    hk = tl.program_id(0)
    segment = tl.program_id(1)
    row, start, length, c, c1, slot, _, _ = load_segment(TABLE, segment)
    if c < c1:
        GROUP: tl.constexpr = H // HK
        # Query heads per state head: with one k map per query head, each head of the group has its own state.
        SHARED: tl.constexpr = H // HS
        of = tl.arange(0, FB)
        od = tl.arange(0, DB)
        oc = tl.arange(0, C)
        position = c * C + oc
        k = load_rows(K, row, start + c * C, hk, k_strides, position < length, D, C, DB)
        v = load_rows(V, row, start + c * C, hk, v_strides, position < length, D, C, DB)
        dk = tl.zeros([C, DB], tl.float32)
        dv = tl.zeros([C, DB], tl.float32)
        # What the loops' bodies share would be computed ahead and spilled: the two sums leave no registers for it.
        for state in tl.range(0, GROUP // SHARED, disable_licm=True):
            hs = hk * (GROUP // SHARED) + state
            place = ((slot + c) * HS + hs) * HALVES * FB
            wk = load_map(WK, hs, DB, FB)
            if WINDOW != TERRACED:
                x = tl.dot(k, wk, input_precision="tf32x3")
                if BIASED:
                    x += load_bias(BK, hs, of, FB)[None, :]
                p_pairs = activation(x, of, ACT, FLOOR, F, FB).to(k.dtype)
                dp_pairs = tl.zeros([C, FB], tl.float32)
                if HALVES == 2:
                    n_pairs = activation(-x, of, ACT, FLOOR, F, FB).to(k.dtype)
                    dn_pairs = tl.zeros([C, FB], tl.float32)
            for member in tl.range(0, SHARED, disable_licm=True):
                h = hs * SHARED + member
                gamma = tl.load(GAMMA + h)
                alpha = tl.load(ALPHA + h)
                # The chunk's own queries, then the next chunk's; tiles are [keys, queries].
                for ahead in tl.range(0, 2 if WINDOW != NO_WINDOW else 1, disable_licm=True):
                    inside = position + ahead * C < length
                    per_token = (row.to(tl.int64) * H + h) * T + start + position + ahead * C
                    q = load_tile(Q, row, start + c * C + ahead * C, h, C, DB)
                    grad = load_tile(GRAD, row, start + c * C + ahead * C, h, C, DB)
                    inverse = tl.where(inside, 1.0 / tl.load(DEN + per_token, mask=inside, other=1.0), 0.0)
                    delta = tl.load(DELTA + per_token, mask=inside, other=0.0)
                    causal = oc[:, None] <= oc[None, :]
                    if WINDOW != NO_WINDOW:
                        top = tl.load(TOP + per_token, mask=inside, other=0.0)
                        total = tl.load(SUM + per_token, mask=inside, other=0.0)
                        argmax = tl.load(ARGMAX + per_token, mask=inside, other=0)
                        score = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale
                        score = softcapped(score, cap, CAPPED) * LOG2E
                        if WINDOW == SLIDING:
                            seen = (causal & (ahead == 0)) | ((oc[:, None] > oc[None, :]) & (ahead == 1))
                        else:
                            seen = causal | (ahead == 1)
                        score = tl.where(seen & inside[None, :], score, float("-inf"))
                        weight = (gamma * inverse)[None, :] * tl.exp2(score - top[None, :])
                        dv = tl.dot(weight.to(q.dtype), grad, dv, input_precision="tf32x3")
                        d_weight = tl.dot(v, tl.trans(grad), input_precision="tf32x3") - delta[None, :]
                        d_score = weight * d_weight
                        at_top = (C - ahead * C + oc)[:, None] == argmax[None, :]
                        d_score = tl.where(at_top, d_score - total[None, :], d_score)
                        d_score = d_score * cap_slope(score, cap, CAPPED) * scale
                        dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision="tf32x3")
                    if WINDOW != TERRACED:
                        wq = load_map(WQ, h, DB, FB)
                        x_query = tl.dot(q, wq, input_precision="tf32x3")
                        if BIASED:
                            x_query += load_bias(BQ, h, of, FB)[None, :]
                        linear = causal & inside[None, :]
                        if WINDOW == SLIDING:
                            linear = linear & (ahead == 1)
                        if WINDOW == NO_WINDOW:
                            d_weight = tl.dot(v, tl.trans(grad), input_precision="tf32x3") - delta[None, :]
                        factor = (alpha * inverse)[None, :]
                        d_pairs = tl.where(linear, factor * d_weight, 0.0).to(q.dtype)
                        features = activation(x_query, of, ACT, FLOOR, F, FB).to(q.dtype)
                        pairs = tl.dot(p_pairs, tl.trans(features), input_precision="ieee")
                        dp_pairs = tl.dot(d_pairs, features, dp_pairs, input_precision="tf32x3")
                        if HALVES == 2:
                            features = activation(-x_query, of, ACT, FLOOR, F, FB).to(q.dtype)
                            pairs = tl.dot(n_pairs, tl.trans(features), pairs, input_precision="ieee")
                            dn_pairs = tl.dot(d_pairs, features, dn_pairs, input_precision="tf32x3")
                        pairs = tl.where(linear, factor * pairs, 0.0).to(q.dtype)
                        dv = tl.dot(pairs, grad, dv, input_precision="tf32x3")
            # The linear part comes after the window, so that its tiles are not held through it.
            x = tl.dot(k, wk, input_precision="tf32x3")
            if BIASED:
                x += load_bias(BK, hs, of, FB)[None, :]
            s = STATES.load([place, 0])
            z = tl.load(STATES_Z + place + of)
            p = activation(x, of, ACT, FLOOR, F, FB)
            dv = tl.dot(p.to(k.dtype), s, dv, input_precision="tf32x3")
            dp = tl.dot(v, tl.trans(s), input_precision="tf32x3") + z[None, :]
            if WINDOW != TERRACED:
                dp += dp_pairs
            dx = activation_grad(p, dp, ACT)
            dk = tl.dot(dx.to(k.dtype), tl.trans(wk), dk, input_precision="tf32x3")
            if HALVES == 2:
                s = STATES.load([place + FB, 0])
                z = tl.load(STATES_Z + place + FB + of)
                n = activation(-x, of, ACT, FLOOR, F, FB)
                dv = tl.dot(n.to(k.dtype), s, dv, input_precision="tf32x3")
                dn = tl.dot(v, tl.trans(s), input_precision="tf32x3") + z[None, :]
                if WINDOW != TERRACED:
                    dn += dn_pairs
                dxn = -activation_grad(n, dn, ACT)
                dk = tl.dot(dxn.to(k.dtype), tl.trans(wk), dk, input_precision="tf32x3")
                if MAPS:
                    dx += dxn
            if MAPS:
                token = DXK + (row.to(tl.int64) * T + start) * HS * F + hs * F
                store_tile(token, position, length, HS * F, of, dx, F, FB)
                if BIASED:
                    db = tl.sum(tl.where((position < length)[:, None], dx, 0.0), 0)
                    tl.store(DBK + (segment.to(tl.int64) * HS + hs) * F + of, db, mask=of < F)
        token = (row.to(tl.int64) * T + start) * HK * D + hk * D
        store_tile(DK + token, position, length, HK * D, od, dk, D, DB)
        store_tile(DV + token, position, length, HK * D, od, dv, D, DB)


@triton.jit
def map_product_kernel(
    X, DX, DW, T, parts, chunks,
    HEADS: tl.constexpr, PER_X: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """DW [B parts, heads, D, F]: sum over `chunks` chunks of a row of x^T dx, with DX [B, T, heads, F]."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    row = part // parts
    of = tl.arange(0, FB)
    od = tl.arange(0, DB)
    oc = tl.arange(0, C)
    base = DX + (row.to(tl.int64) * T * HEADS + head) * F
    dw = tl.zeros([DB, FB], tl.float32)
    for c in range(0, chunks):
        token = ((part % parts) * chunks + c) * C
        x = load_tile(X, row, token, head // PER_X, C, DB)
        position = token + oc
        inside = (position < T)[:, None] & (of < F)[None, :]
        dx = tl.load(base + position.to(tl.int64)[:, None] * (HEADS * F) + of[None, :], mask=inside, other=0.0)
        dw = tl.dot(tl.trans(x), dx, dw, input_precision="tf32x3")
    place = (part.to(tl.int64) * HEADS + head) * D * F + od[:, None] * F + of[None, :]
    tl.store(DW + place, dw, mask=(od < D)[:, None] & (of < F)[None, :])

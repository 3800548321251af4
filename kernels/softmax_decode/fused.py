"""The step in Triton. The filled slots are divided between programs, whose sums a second kernel joins.

How many slots are filled stands in device memory, so programs that find nothing to do end at once, and a launch fits
every position.

# B batch, H query heads, Hk key/value heads, D head dim (DB: next power of two), C slots, s sinks (SB)
# G query heads of a group, padded; N slots of a tile; P pieces
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats_kernels.hybrid_attention.fused.features import LOG2E, softcapped
from lolcats_kernels.softmax_decode.step import DecodeStep

# Rows of the smallest product on tensor cores: query heads of a group are padded to it.
GROUP_ROWS = 16
# Slots of a tile, and bytes of a tile of keys at most: two of them and two of values fit every GPU's shared memory.
TILE, TILE_BYTES = 64, 32 * 2**10
# Programs that fill the device (four waves over 132 multiprocessors), and the most that one head's slots are cut into.
FILL, MOST_PIECES = 528, 128


@triton.jit
def pieces_used(newest, slots, pieces, N: tl.constexpr):
    """Pieces that have a tile of filled slots; the first always has the new token."""
    filled = tl.minimum(newest + 1, slots).to(tl.int32)
    return tl.minimum(pieces, tl.cdiv(filled, N))


@triton.jit
def attend(q, k, v, seen, top, den, acc, scale, cap, CAPPED: tl.constexpr):
    """A tile of keys and values [N, DB] joins the running maximum and denominator [G] and sum [G, DB]."""
    score = softcapped(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale, cap, CAPPED) * LOG2E
    score = tl.where(seen[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp2(top - higher)
    weight = tl.exp2(score - higher[:, None])
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return higher, den * shrink + tl.sum(weight, 1), acc


@triton.jit
def piece_kernel(
    Q, K, V, KEYS, VALUES, PADDING_MASK, SINK_K, SINK_V, SINK_COLUMN, NEWEST, Y, TOP, DEN, ACC,
    pieces, slots, scale, cap, q_b, q_h, k_b, k_h, v_b, v_h,
    H: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, N: tl.constexpr,
    SINKS: tl.constexpr, SB: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """Y [B, H, D], or of one piece: TOP, DEN [B, H, P] and ACC [B, H, P, D]. Piece p has tiles p, p + P, ..."""
    hk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    newest = tl.load(NEWEST)
    used = pieces_used(newest, slots, pieces, N)
    if piece < used:
        own = (newest % slots).to(tl.int32)
        filled = tl.minimum(newest + 1, slots).to(tl.int32)
        GROUP: tl.constexpr = H // HK
        og = tl.arange(0, G)
        od = tl.arange(0, DB)
        on = tl.arange(0, N)
        in_d = od < D
        in_group = og < GROUP
        heads = hk * GROUP + og
        inside = in_group[:, None] & in_d[None, :]
        q = tl.load(Q + b * q_b + heads[:, None] * q_h + od[None, :], mask=inside, other=0.0)
        head_slots = (b * HK + hk) * slots
        # Finite, so that a tile of which nothing is seen weighs nothing.
        top = tl.full([G], -1e30, tl.float32)
        den = tl.zeros([G], tl.float32)
        acc = tl.zeros([G, DB], tl.float32)
        if piece == 0:
            k_new = tl.load(K + b * k_b + hk * k_h + od, mask=in_d, other=0.0)
            v_new = tl.load(V + b * v_b + hk * v_h + od, mask=in_d, other=0.0)
            tl.store(KEYS + (head_slots + own) * D + od, k_new, mask=in_d)
            tl.store(VALUES + (head_slots + own) * D + od, v_new, mask=in_d)
            if PADDED:
                if hk == 0:
                    tl.store(PADDING_MASK + b * slots + own, 1)
            product = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
            top = softcapped(product, cap, CAPPED) * LOG2E
            den += 1.0
            acc += v_new.to(tl.float32)[None, :]
            if SINKS > 0:
                os = tl.arange(0, SB)
                in_s = os < SINKS
                gone = in_s & (tl.load(SINK_COLUMN + b * SINKS + os, mask=in_s, other=0) <= newest - slots)
                place = ((b * HK + hk) * SINKS + os)[:, None] * D + od[None, :]
                tile = gone[:, None] & in_d[None, :]
                k = tl.load(SINK_K + place, mask=tile, other=0.0)
                v = tl.load(SINK_V + place, mask=tile, other=0.0)
                top, den, acc = attend(q, k, v, gone, top, den, acc, scale, cap, CAPPED)
        for first in range(piece * N, filled, pieces * N):
            slot = first + on
            # The first piece writes the new token's slot, and has seen it.
            seen = (slot < filled) & (slot != own)
            if PADDED:
                seen = seen & (tl.load(PADDING_MASK + b * slots + slot, mask=seen, other=0) != 0)
            place = (head_slots + slot)[:, None] * D + od[None, :]
            tile = seen[:, None] & in_d[None, :]
            k = tl.load(KEYS + place, mask=tile, other=0.0)
            v = tl.load(VALUES + place, mask=tile, other=0.0)
            top, den, acc = attend(q, k, v, seen, top, den, acc, scale, cap, CAPPED)
        row = b * H + heads
        if DIVIDED:
            row = row * pieces + piece
            tl.store(TOP + row, top, mask=in_group)
            tl.store(DEN + row, den, mask=in_group)
            tl.store(ACC + row[:, None] * D + od[None, :], acc, mask=inside)
        else:
            y = acc / den[:, None]
            tl.store(Y + row[:, None] * D + od[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def join_kernel(
    TOP, DEN, ACC, NEWEST, Y, pieces, slots, D: tl.constexpr, DB: tl.constexpr, N: tl.constexpr, PB: tl.constexpr
):
    """Y [D] of one sequence and query head from its pieces, PB at a time."""
    row = tl.program_id(0).to(tl.int64)
    used = pieces_used(tl.load(NEWEST), slots, pieces, N)
    od = tl.arange(0, DB)
    in_d = od < D
    op = tl.arange(0, PB)
    top = -1e30
    den = 0.0
    acc = tl.zeros([DB], tl.float32)
    for first in range(0, used, PB):
        inside = first + op < used
        place = row * pieces + first + op
        tops = tl.load(TOP + place, mask=inside, other=-1e30)
        higher = tl.maximum(top, tl.max(tops, 0))
        weight = tl.where(inside, tl.exp2(tops - higher), 0.0)
        shrink = tl.exp2(top - higher)
        parts = tl.load(ACC + place[:, None] * D + od[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        den = den * shrink + tl.sum(tl.load(DEN + place, mask=inside, other=0.0) * weight, 0)
        top = higher
    tl.store(Y + row * D + od, (acc / den).to(Y.dtype.element_ty), mask=in_d)


def softmax_decode(step: DecodeStep) -> Tensor:
    """[B, 1, H, D] as `softmax_decode_`."""
    keys, values, newest, mask = step.keys, step.values, step.newest, step.padding_mask
    batch, heads, _, dim = step.q.shape
    key_heads, slots = keys.shape[1:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (step.q, step.k, step.v))
    padded_dim = max(16, triton.next_power_of_2(dim))
    row_bytes = padded_dim * keys.element_size()
    tile = min(TILE, TILE_BYTES // row_bytes)
    pieces = max(1, min(MOST_PIECES, FILL // (batch * key_heads), triton.cdiv(slots, tile)))
    # A third tile on its way pays where few programs share the memory's bandwidth (measured), and must fit.
    stages = 3 if pieces == MOST_PIECES and row_bytes <= 256 else 2
    y = torch.empty(batch, 1, heads, dim, dtype=q.dtype, device=q.device)
    divided = pieces > 1
    shape = (batch, heads, pieces) if divided else (0,)
    top, den = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    acc = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    sink_k, sink_v, sink_column = step.sinks or (keys, values, newest)
    count = 0 if step.sinks is None else sink_k.shape[2]
    constants = {"D": dim, "DB": padded_dim, "N": tile}
    piece_kernel[(key_heads, batch, pieces)](
        q, k, v, keys, values, newest if mask is None else mask.view(torch.uint8), sink_k, sink_v, sink_column, newest,
        y, top, den, acc, pieces, slots, step.scale, step.softcap or 0.0,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), **constants,
        H=heads, HK=key_heads, G=max(GROUP_ROWS, triton.next_power_of_2(heads // key_heads)), SINKS=count,
        SB=max(16, triton.next_power_of_2(count)), PADDED=mask is not None, CAPPED=step.softcap is not None,
        DIVIDED=divided, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if divided:
        join_kernel[(batch * heads,)](top, den, acc, newest, y, pieces, slots, **constants, PB=16, num_warps=4)
    return y

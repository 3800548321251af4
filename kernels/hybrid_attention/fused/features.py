"""Device functions shared by the kernels: tiles of tokens, feature maps and their gradients, window scores.

A map with two halves is one activation taken at x W and at -x W, so every half is the same function.

# C chunk size, D head dim (DB: next power of two), F columns of a map (FB likewise)
"""

from __future__ import annotations

import triton
import triton.language as tl

TERRACED = tl.constexpr(0)
SLIDING = tl.constexpr(1)
NO_WINDOW = tl.constexpr(2)
SOFTMAX = tl.constexpr(0)
RELU = tl.constexpr(1)
ELU = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
FEATURE_FLOOR = tl.constexpr(1e-12)

WINDOWS = {"terraced": 0, "sliding": 1, "none": 2}
# Name → (activation, halves).
ACTIVATIONS = {
    "hedgehog": (0, 2),
    "t2r": (1, 1),
    "elu": (2, 1),
}


@triton.jit
def load_segment(TABLE, segment):
    """(row, first token, length, first chunk, chunk after the last, chunk slot, sequence, ends its sequence)."""
    entry = TABLE + segment * 8
    return (
        tl.load(entry),
        tl.load(entry + 1),
        tl.load(entry + 2),
        tl.load(entry + 3),
        tl.load(entry + 4),
        tl.load(entry + 5),
        tl.load(entry + 6).to(tl.int64),
        tl.load(entry + 7),
    )


@triton.jit
def load_tile(X, row, token, head, C: tl.constexpr, DB: tl.constexpr):
    """[C, DB] from `token` on, through a descriptor of [B, T, heads, D] with blocks [1, C, 1, DB].

    Zeros before the row, after it and in padded columns; what follows a sequence inside its row is not masked here.
    """
    return X.load([row, token, head, 0]).reshape(C, DB)


@triton.jit
def load_rows(X, row, token, head, strides, inside, D: tl.constexpr, C: tl.constexpr, DB: tl.constexpr):
    """`load_tile` through pointers into [B, T, heads, D] of the given strides; zeros where not `inside`.

    As the left operand of a product, what comes through a descriptor is kept in registers (Triton 3.6): its block has
    to lose two dimensions first. What pointers load goes through shared memory, and costs none.
    """
    stride_row, stride_token, stride_head = strides
    columns = tl.arange(0, DB)
    place = X + row.to(tl.int64) * stride_row + head * stride_head
    place += (token + tl.arange(0, C)).to(tl.int64)[:, None] * stride_token + columns[None, :]
    inside = inside[:, None]
    if D != DB:
        inside = inside & (columns < D)[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def load_map(W, head, DB: tl.constexpr, FB: tl.constexpr):
    """[DB, FB] of one head, through a descriptor of [heads, D, FB]."""
    return W.load([head, 0, 0]).reshape(DB, FB)


@triton.jit
def store_tile(base, position, length, stride, columns, value, D: tl.constexpr, DB: tl.constexpr):
    """Write a [C, DB] tile; nothing outside the sequence or in padded columns."""
    inside = ((position >= 0) & (position < length))[:, None]
    if D != DB:
        inside = inside & (columns < D)[None, :]
    place = base + position.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_bias(B, head, of, FB: tl.constexpr):
    """[FB] bias of one head from [heads, FB]."""
    return tl.load(B + head * FB + of)


@triton.jit
def activation(x, of, ACT: tl.constexpr, FLOOR: tl.constexpr, F: tl.constexpr, FB: tl.constexpr):
    """One half of the features [C, FB] in float32 from x [C, FB]; zeros in padded columns."""
    valid = (of < F)[None, :]
    if ACT == SOFTMAX:
        if F != FB:
            x = tl.where(valid, x, float("-inf"))
        y = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        y = y * (1.0 / tl.sum(y, 1))[:, None]
    elif ACT == RELU:
        y = tl.maximum(x, 0.0)
    else:
        y = tl.where(x > 0, x + 1, tl.exp2(x * LOG2E))
    if FLOOR:
        y = tl.maximum(y, FEATURE_FLOOR)
    if F != FB:
        y = tl.where(valid, y, 0.0)
    return y


@triton.jit
def activation_grad(y, dy, ACT: tl.constexpr):
    """Gradient at x from the features y and their gradient dy, both [C, FB]."""
    if ACT == SOFTMAX:
        dx = y * (dy - tl.sum(dy * y, 1)[:, None])
    elif ACT == RELU:
        dx = tl.where(y > FEATURE_FLOOR, dy, 0.0)
    else:
        dx = dy * tl.minimum(y, 1.0)
    return dx


@triton.jit
def softcapped(s, cap, CAPPED: tl.constexpr):
    """cap tanh(s / cap), or s."""
    if CAPPED:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
    return s


@triton.jit
def window_scores(q, k, k_previous, c, scale, cap, C: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr):
    """Scores over a chunk's own keys and over the previous chunk's, in units of log2; -inf outside the window."""
    rows = tl.arange(0, C)[:, None]
    columns = tl.arange(0, C)[None, :]
    own = softcapped(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale, cap, CAPPED) * LOG2E
    previous = softcapped(tl.dot(q, tl.trans(k_previous), input_precision="tf32x3") * scale, cap, CAPPED) * LOG2E
    own = tl.where(rows >= columns, own, float("-inf"))
    if WINDOW == SLIDING:
        previous = tl.where((c > 0) & (columns > rows), previous, float("-inf"))
    else:
        previous = tl.where(c > 0, previous, float("-inf"))
    return own, previous

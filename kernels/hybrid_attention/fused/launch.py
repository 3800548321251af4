"""Launches of the fused kernels: forward, full backward and attention transfer on raw tensors, without autograd.

# B batch, T tokens, C chunk size, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns
# E features, n sequences
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.fused.backward import (
    key_gradient_kernel,
    map_product_kernel,
    query_gradient_kernel,
)
from lolcats_kernels.hybrid_attention.fused.call import Call, State, aligned, tiles
from lolcats_kernels.hybrid_attention.fused.layout import Layout
from lolcats_kernels.hybrid_attention.fused.output import map_gradient_kernel, output_kernel
from lolcats_kernels.hybrid_attention.fused.states import reverse_states_kernel, states_kernel

# Programs that fill the device (two waves over 132 multiprocessors): sequences are split until there are so many.
FILL = 528
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(q: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig) -> str | None:
    """The constraint that keeps a call from the fused kernels, or None."""
    if weights.decay is not None:
        return "a decay of the linear weights is computed by the chunked form alone"
    if weights.share is not None or weights.frequencies is not None or config.window_sinks:
        return "window sinks, unrotated features and the mixture are computed by the chunked form alone"
    columns = weights.w_q.shape[-1]
    size = config.window_size
    if q.dtype not in DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return f"the head dim must be one of {HEAD_DIMS} for q, k and v, got {q.shape[-1]} and {v.shape[-1]}"
    if not 16 <= columns <= 128:
        return f"the feature dim must be from 16 to 128, got {columns}"
    if config.window != "none" and (size not in (16, 32, 64, 128)):
        return f"the window size must be 16, 32, 64 or 128, got {size}"
    return None


def value_block(call: Call) -> int:
    """Values per program of the state kernels: [F, BV] sums of at most 32 KiB stay in registers."""
    return min(call.padded_dim, max(32, 8192 // call.padded_columns))


def segments_for(call: Call, parts: int) -> Layout:
    """Segments of the state kernels: as few as fill the device, since each more costs a second pass."""
    sequences, chunk = call.sequences, call.chunk
    chunks = sequences.batch * -(-sequences.tokens // chunk)
    wanted = max(1, FILL // (call.state_heads * parts))
    longest = -(-sequences.tokens // chunk)
    if sequences.count >= wanted:
        return sequences.layout(chunk, longest)
    return sequences.layout(chunk, min(longest, max(4, triton.next_power_of_2(-(-chunks // wanted)))))


def chunk_states(call: Call, initial: State | None, final: State | None) -> State:
    """States before each chunk (`Call.empty_states`); fills `final` (`Call.empty_sums` of n sequences)."""
    block = value_block(call)
    parts = call.halves * (call.padded_dim // block)
    layout = segments_for(call, parts)
    states, nothing = call.empty_states(layout.slots), (call.weights.window_factor,) * 2
    sums = call.empty_sums(layout.segments) if layout.split else nothing
    constants = call.map_constants() | {
        "HS": call.state_heads,
        "PER_KEY": call.state_heads // call.key_heads,
        "BV": block,
        "LAG": 1 if call.config.window == "none" else 2,
        "WINDOW": call.config.window,
        "SPLIT": layout.split,
        "CONTINUED": initial is not None,
        "ENDS": final is not None,
    }
    del constants["D"]

    for store in (False, True) if layout.split else (True,):
        states_kernel[(call.state_heads, layout.segments, parts)](
            tiles(call.k, call.chunk), tiles(call.v, call.chunk, block), call.map_tiles(call.weights.w_k),
            call.bias(call.weights.b_k), *(initial or nothing), *sums, call.state_tiles(states[0], block), states[1],
            *(final or nothing), layout.table, layout.first, **constants, STORE=store, num_warps=_warps(call),
            num_stages=_stages(call),
        )  # fmt: skip
    return states


def reverse_states(call: Call, grad: Tensor, den: Tensor, delta: Tensor) -> State:
    """Gradients of the states that each chunk's keys were added to, as `chunk_states`."""
    block = value_block(call)
    parts = call.halves * (call.padded_dim // block)
    layout = segments_for(call, parts)
    states = call.empty_states(layout.slots)
    sums = call.empty_sums(layout.segments) if layout.split else (call.weights.window_factor,) * 2
    constants = call.map_constants() | {
        "H": call.heads,
        "HS": call.state_heads,
        "BV": block,
        "LAG": 1 if call.config.window == "none" else 2,
        "SPLIT": layout.split,
    }
    del constants["D"]
    for store in (False, True) if layout.split else (True,):
        reverse_states_kernel[(call.state_heads, layout.segments, parts)](
            tiles(call.q, call.chunk), call.map_tiles(call.weights.w_q), call.bias(call.weights.b_q),
            tiles(grad, call.chunk, block), den, delta, call.weights.linear_factor, *sums,
            call.state_tiles(states[0], block), states[1], layout.table, layout.first, call.q.shape[1], **constants,
            STORE=store, num_warps=_warps(call), num_stages=_stages(call),
        )  # fmt: skip
    return states


def forward(call: Call, initial: State | None = None, final: State | None = None, den: Tensor | None = None) -> Tensor:
    """y [B, T, H, D]; `initial` S [n, Hs, E, D] and z [n, Hs, E] in float32; `final`, the same, is filled.

    Args:
        den: [B, H, T] in float32, filled with the denominators that `backward` needs.
    """
    states = chunk_states(call, initial, final)
    y = call.outputs()
    layout = call.sequences.layout(call.chunk, 1)
    none = call.weights.window_factor
    output_kernel[(call.heads, layout.segments)](
        *call.operands(states), y, layout.table, none, none if den is None else den, none, none,
        *call.scores(), call.q.shape[1],
        **call.window_constants(), TRANSFER=False, GRADIENTS=den is not None, num_warps=_warps(call), num_stages=1,
    )  # fmt: skip
    return y


def backward(
    call: Call, y: Tensor, den: Tensor, grad: Tensor, initial: State | None, *, maps: bool
) -> tuple[Tensor, Tensor, Tensor, HybridWeights | None]:
    """Gradients of q, k and v; of the maps only with `maps` (low-rank finetuning freezes them). `den`: of `forward`."""
    grad, y = aligned(grad.to(call.q.dtype)), aligned(y)
    batch, tokens = call.q.shape[:2]
    device, columns = call.q.device, call.columns
    # Tokens that belong to no sequence have no gradient.
    make = torch.empty if call.sequences.lengths is None else torch.zeros
    dq = make(call.q.shape, dtype=call.q.dtype, device=device)
    dk, dv = (make(call.k.shape, dtype=call.q.dtype, device=device) for _ in range(2))
    layout = call.sequences.layout(call.chunk, 1)
    delta, top, total = (call.per_token() for _ in range(3))
    argmax = call.per_token(torch.int32)
    dxq = make(batch, tokens, call.heads, columns, dtype=call.q.dtype, device=device) if maps else dq
    dxk = make(batch, tokens, call.state_heads, columns, dtype=call.q.dtype, device=device) if maps else dk
    euler = torch.zeros(layout.segments, call.heads, dtype=torch.float32, device=device)
    dbq, dbk = (
        torch.zeros(layout.segments, heads, columns if call.biased else 0, dtype=torch.float32, device=device)
        for heads in (call.heads, call.state_heads)
    )
    constants = call.window_constants() | {"MAPS": maps, "num_warps": _warps(call), "num_stages": 1}
    grads = tiles(grad, call.chunk)
    states = chunk_states(call, initial, None)
    query_gradient_kernel[(call.heads, layout.segments)](
        *call.operands(states), tiles(y, call.chunk), grads, layout.table,
        dq, dxq, den, delta, top, total, argmax, euler, dbq, *call.scores(), tokens, **constants,
    )  # fmt: skip
    q, _, _, *others = call.operands(reverse_states(call, grad, den, delta))
    key_gradient_kernel[(call.key_heads, layout.segments)](
        q, call.k, call.v, *others, grads, layout.table,
        dk, dv, dxk, den, delta, top, total, argmax, dbk, *call.scores(), tokens,
        call.k.stride()[:3], call.v.stride()[:3], **constants,
    )  # fmt: skip
    if not maps:
        return dq, dk, dv, None
    euler = euler.sum(0)
    alpha = call.weights.linear_factor
    assert alpha is not None
    return (
        dq,
        dk,
        dv,
        HybridWeights(
            _map_product(call, call.q, dxq),
            _map_product(call, call.k, dxk),
            torch.zeros_like(euler) if call.config.window == "none" else -euler / call.weights.window_factor,
            euler / alpha,
            dbq.sum(0) if call.biased else None,
            dbk.sum(0) if call.biased else None,
        ),
    )


def transfer(call: Call, target: Tensor, *, gradients: bool) -> tuple[Tensor, HybridWeights | None]:
    """Sum of squared errors of the output against `target` [B, T, H, D], and the gradients of half of it.

    Terraced windows only, where the window itself needs no gradient (docs/method.md, section 6). Neither the output nor
    the features are stored.
    """
    target = aligned(target.to(call.q.dtype))
    states = chunk_states(call, None, None)
    layout = call.sequences.layout(call.chunk, 1)
    tokens = call.q.shape[1]
    errors = call.outputs() if gradients else target
    den, delta = (call.per_token() if gradients else call.weights.window_factor for _ in range(2))
    loss = call.parts(layout, call.heads)
    output_kernel[(call.heads, layout.segments)](
        *call.operands(states), errors, layout.table, tiles(target, call.chunk), den, delta, loss,
        *call.scores(), tokens, **call.window_constants(), TRANSFER=True, GRADIENTS=gradients,
        num_warps=_warps(call), num_stages=1,
    )  # fmt: skip
    if not gradients:
        return loss.sum(), None
    layout = call.sequences.layout(call.chunk, _chunks_per_program(call, call.heads))

    weights, alpha = call.weights, call.weights.linear_factor
    assert alpha is not None

    def map_gradient(x: Tensor, other: Tensor, w: Tensor, bias: Tensor | None, states: State, query: bool) -> Any:
        heads = w.shape[0]
        dw = call.parts(layout, heads, call.dim, call.columns)
        db, euler = call.parts(layout, heads, call.columns), call.parts(layout, heads)
        map_gradient_kernel[(heads, layout.segments)](
            tiles(x, call.chunk), tiles(other, call.chunk), call.map_tiles(w), call.bias(bias),
            call.state_tiles(states[0], call.padded_dim), states[1], den, delta, weights.linear_factor, dw, db, euler,
            layout.table, tokens, HEADS=heads, PER_X=heads // x.shape[2], PER_STATE=heads // call.state_heads,
            QUERY=query, **call.map_constants(), num_warps=_warps(call), num_stages=1,
        )  # fmt: skip
        return dw.sum(0), db.sum(0) if call.biased else None, euler.sum(0)

    w_q, b_q, euler = map_gradient(call.q, errors, weights.w_q, weights.b_q, states, query=True)
    del states
    reverse = reverse_states(call, errors, den, delta)
    w_k, b_k, _ = map_gradient(call.k, call.v, weights.w_k, weights.b_k, reverse, query=False)
    # By Euler's theorem: the output does not change when both factors are scaled alike.
    return loss.sum(), HybridWeights(w_q, w_k, -euler / weights.window_factor, euler / alpha, b_q, b_k)


def _chunks_per_program(call: Call, heads: int) -> int:
    """Chunks that share one partial sum of a map's gradient: many, but enough programs to fill the device."""
    longest = -(-call.sequences.tokens // call.chunk)
    wanted = max(1, FILL // (2 * heads * call.sequences.batch))
    return -(-longest // min(longest, wanted))


def _map_product(call: Call, x: Tensor, dx: Tensor) -> Tensor:
    """[heads, D, F] in float32: the sum over tokens of x^T dx, x [B, T, Hx, D] and dx [B, T, heads, F]."""
    batch, tokens, heads, columns = dx.shape
    chunks = _chunks_per_program(call, heads)
    parts = triton.cdiv(triton.cdiv(tokens, call.chunk), chunks)
    dw = torch.empty(batch * parts, heads, call.dim, columns, dtype=torch.float32, device=x.device)
    map_product_kernel[(heads, batch * parts)](
        tiles(x, call.chunk), dx, dw, tokens, parts, chunks, HEADS=heads, PER_X=heads // x.shape[2], D=call.dim,
        DB=call.padded_dim, F=columns, FB=call.padded_columns, C=call.chunk, num_warps=_warps(call),
        num_stages=_stages(call),
    )  # fmt: skip
    return dw.sum(0)


def _stages(call: Call) -> int:
    """Tiles of k and v under way in the state kernels; two of them where shared memory holds as much."""
    return 1 if call.q.dtype == torch.float32 or call.dim * call.columns > 8192 else 2


def _warps(call: Call, base: int = 4) -> int:
    """Warps per program: twice as many where tiles are twice as large."""
    large = call.dim > 128 or call.columns > 64 or call.chunk > 64 or call.q.dtype == torch.float32
    return min(8, base * 2) if large else base

"""Launches of the fused kernels: forward, full backward and attention transfer on raw tensors, without autograd.

# B batch, T tokens, C chunk size, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns
# E features, n sequences
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lolcats_kernels.hybrid_attention.fused.backward import (
    key_gradient_kernel,
    map_product_kernel,
    query_gradient_kernel,
)
from lolcats_kernels.hybrid_attention.fused.features import ACTIVATIONS, WINDOWS
from lolcats_kernels.hybrid_attention.fused.layout import Layout, Sequences
from lolcats_kernels.hybrid_attention.fused.output import map_gradient_kernel, output_kernel
from lolcats_kernels.hybrid_attention.fused.states import reverse_states_kernel, states_kernel
from lolcats_kernels.hybrid_attention.spec import Maps, Spec

# Chunk of pure linear attention, which has no window to take it from.
CHUNK_WITHOUT_WINDOW = 64
# Programs that fill the device (two waves over 132 multiprocessors): sequences are split until there are so many.
FILL = 528
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
State = tuple[Tensor, Tensor]


def unsupported(q: Tensor, v: Tensor, maps: Maps, spec: Spec) -> str | None:
    """The constraint that keeps a call from the fused kernels, or None."""
    columns = maps.w_q.shape[-1]
    size = spec.window_size
    if q.dtype not in DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return f"the head dim must be one of {HEAD_DIMS} for q, k and v, got {q.shape[-1]} and {v.shape[-1]}"
    if not 16 <= columns <= 128:
        return f"the feature dim must be from 16 to 128, got {columns}"
    if spec.window != "none" and (size not in (16, 32, 64, 128)):
        return f"the window size must be 16, 32, 64 or 128, got {size}"
    return None


@dataclass(frozen=True)
class Call:
    """Operands of one call in the kernels' terms: maps in the dtype of q, factors in float32, constants."""

    q: Tensor
    k: Tensor
    v: Tensor
    maps: Maps
    spec: Spec
    sequences: Sequences
    columns: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, maps: Maps, spec: Spec, sequences: Sequences) -> Call:
        q, k, v = (_aligned(x) for x in (q, k.to(q.dtype), v.to(q.dtype)))

        # Products of float32 tiles 16 columns wide read beyond their shared memory (Triton 3.6, sm_90).
        least = 32 if q.dtype == torch.float32 else 16
        columns = max(least, triton.next_power_of_2(maps.w_q.shape[-1]))

        def padded(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if x is None:
                return None
            return F.pad(x.detach().to(dtype), (0, columns - x.shape[-1])).contiguous()

        w_q = padded(maps.w_q, q.dtype)
        w_k = w_q if maps.w_k is maps.w_q else padded(maps.w_k, q.dtype)
        b_q, b_k = padded(maps.b_q, torch.float32), padded(maps.b_k, torch.float32)
        gamma, alpha = (x.detach().float().contiguous() for x in (maps.gamma, maps.linear_factor()))
        assert w_q is not None and w_k is not None  # noqa: PT018
        return Call(q, k, v, Maps(w_q, w_k, gamma, alpha, b_q, b_k), spec, sequences, maps.w_q.shape[-1])

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def key_heads(self) -> int:
        return self.k.shape[2]

    @property
    def state_heads(self) -> int:
        return self.maps.w_k.shape[0]

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def padded_dim(self) -> int:
        return triton.next_power_of_2(self.dim)

    @property
    def padded_columns(self) -> int:
        return self.maps.w_q.shape[-1]

    @property
    def halves(self) -> int:
        return ACTIVATIONS[self.spec.feature_map][1]

    @property
    def features(self) -> int:
        """Rows of a state of one head, padding included."""
        return self.halves * self.padded_columns

    @property
    def chunk(self) -> int:
        return CHUNK_WITHOUT_WINDOW if self.spec.window == "none" else self.spec.window_size

    @property
    def biased(self) -> bool:
        return self.maps.b_q is not None

    def bias(self, which: Tensor | None) -> Tensor:
        """A bias, or any tensor in the place of none."""
        return self.maps.gamma if which is None else which

    def map_constants(self) -> dict[str, Any]:
        """Shapes and activation of the maps."""
        return {
            "D": self.dim,
            "DB": self.padded_dim,
            "F": self.columns,
            "FB": self.padded_columns,
            "C": self.chunk,
            "ACT": ACTIVATIONS[self.spec.feature_map][0],
            "HALVES": self.halves,
            # Behind a window the denominator is at least gamma, and a floor of 1e-12 is nothing.
            "FLOOR": self.spec.window == "none",
            "BIASED": self.biased,
        }

    def window_constants(self) -> dict[str, Any]:
        return {
            "H": self.heads,
            "HK": self.key_heads,
            "HS": self.state_heads,
            "WINDOW": WINDOWS[self.spec.window],
            "CAPPED": self.spec.softcap is not None,
        } | self.map_constants()

    def operands(self, states: State) -> tuple[Any, ...]:
        """The arguments that the kernels of outputs and gradients begin with."""
        q, k, v = (tiles(x, self.chunk) for x in (self.q, self.k, self.v))
        maps, s = self.maps, self.state_tiles(states[0], self.padded_dim)
        w_q, w_k = self.map_tiles(maps.w_q), self.map_tiles(maps.w_k)
        return q, k, v, w_q, w_k, self.bias(maps.b_q), self.bias(maps.b_k), maps.gamma, maps.alpha, s, states[1]

    def scores(self) -> tuple[float, float]:
        return self.spec.scale, self.spec.softcap or 0.0

    def empty_sums(self, count: int) -> State:
        """S [count, Hs, E, D] and z [count, Hs, E] in float32 with padded E and D, not filled."""
        shape = (count, self.state_heads, self.features)
        s = torch.empty(*shape, self.padded_dim, dtype=torch.float32, device=self.q.device)
        return s, torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def empty_states(self, slots: int) -> State:
        """States by chunk: S [slots Hs E, D] in the dtype of q and z [slots Hs E] in float32, not filled."""
        rows = slots * self.state_heads * self.features
        s = torch.empty(rows, self.dim, dtype=self.q.dtype, device=self.q.device)
        return s, torch.empty(rows, dtype=torch.float32, device=self.q.device)

    def map_tiles(self, w: Tensor) -> TensorDescriptor:
        """Descriptor of a map [heads, D, F] for one head."""
        return TensorDescriptor(w, list(w.shape), list(w.stride()), [1, self.padded_dim, self.padded_columns])

    def state_tiles(self, s: Tensor, width: int) -> TensorDescriptor:
        """Descriptor of states by chunk for one half of one head and `width` values."""
        return TensorDescriptor(s, list(s.shape), list(s.stride()), [self.padded_columns, width])

    def padded_state(self, state: tuple[Tensor, Tensor] | None) -> State | None:
        """A state S [n, Hs, E, D], z [n, Hs, E] with E and D padded as the kernels keep them."""
        if state is None:
            return None
        s, z = (x.detach().float().unflatten(2, (self.halves, -1)) for x in state)
        extra = self.padded_columns - self.columns
        s, z = F.pad(s, (0, self.padded_dim - self.dim, 0, extra)), F.pad(z, (0, extra))
        return s.flatten(2, 3).contiguous(), z.flatten(2, 3).contiguous()

    def cropped_state(self, state: State) -> State:
        """The inverse of `padded_state`."""
        s, z = (
            x.unflatten(2, (self.halves, -1))[..., : self.columns, :]
            if x.dim() == 4
            else x.unflatten(2, (self.halves, -1))[..., : self.columns]
            for x in state
        )
        return s[..., : self.dim].flatten(2, 3).contiguous(), z.flatten(2, 3).contiguous()

    def outputs(self) -> Tensor:
        """[B, T, H, D]; zeros where tokens may belong to no sequence."""
        whole = self.sequences.lengths is None
        make = torch.empty if whole else torch.zeros
        return make(self.q.shape, dtype=self.q.dtype, device=self.q.device)

    def parts(self, layout: Layout, *shape: int) -> Tensor:
        """Float32 partial sums by segment, not filled."""
        return torch.empty(layout.segments, *shape, dtype=torch.float32, device=self.q.device)

    def per_token(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, H, T], not filled."""
        shape = (self.q.shape[0], self.heads, self.q.shape[1])
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def tiles(x: Tensor, chunk: int, width: int | None = None) -> TensorDescriptor:
    """Descriptor of [B, T, heads, D] for blocks of `chunk` tokens and `width` columns of one head."""
    width = triton.next_power_of_2(x.shape[3]) if width is None else width
    # The stride of a dimension of one is never used, but has to be a legal one.
    strides = [x.stride(i) if x.shape[i] > 1 else x.shape[i + 1 :].numel() for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, chunk, 1, width])


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied if a descriptor cannot address it: 16-byte strides, columns side by side."""
    item = x.element_size()
    pitches = [x.stride(i) * item for i in range(x.dim() - 1) if x.shape[i] > 1]
    fits = x.stride(-1) == 1 and all(pitch % 16 == 0 for pitch in pitches) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


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
    states, nothing = call.empty_states(layout.slots), (call.maps.gamma,) * 2
    sums = call.empty_sums(layout.segments) if layout.split else nothing
    constants = call.map_constants() | {
        "HS": call.state_heads,
        "PER_KEY": call.state_heads // call.key_heads,
        "BV": block,
        "LAG": 1 if call.spec.window == "none" else 2,
        "WINDOW": WINDOWS[call.spec.window],
        "SPLIT": layout.split,
        "CONTINUED": initial is not None,
        "ENDS": final is not None,
    }
    del constants["D"]

    for store in (False, True) if layout.split else (True,):
        states_kernel[(call.state_heads, layout.segments, parts)](
            tiles(call.k, call.chunk), tiles(call.v, call.chunk, block), call.map_tiles(call.maps.w_k),
            call.bias(call.maps.b_k), *(initial or nothing), *sums, call.state_tiles(states[0], block), states[1],
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
    sums = call.empty_sums(layout.segments) if layout.split else (call.maps.gamma,) * 2
    constants = call.map_constants() | {
        "H": call.heads,
        "HS": call.state_heads,
        "BV": block,
        "LAG": 1 if call.spec.window == "none" else 2,
        "SPLIT": layout.split,
    }
    del constants["D"]
    for store in (False, True) if layout.split else (True,):
        reverse_states_kernel[(call.state_heads, layout.segments, parts)](
            tiles(call.q, call.chunk), call.map_tiles(call.maps.w_q), call.bias(call.maps.b_q),
            tiles(grad, call.chunk, block), den, delta, call.maps.alpha, *sums, call.state_tiles(states[0], block),
            states[1], layout.table, layout.first, call.q.shape[1], **constants, STORE=store, num_warps=_warps(call),
            num_stages=_stages(call),
        )  # fmt: skip
    return states


def forward(call: Call, initial: State | None = None, final: State | None = None) -> Tensor:
    """y [B, T, H, D]; `initial` S [n, Hs, E, D] and z [n, Hs, E] in float32; `final`, the same, is filled."""
    states = chunk_states(call, initial, final)
    y = call.outputs()
    layout = call.sequences.layout(call.chunk, 1)
    none = call.maps.gamma
    output_kernel[(call.heads, layout.segments)](
        *call.operands(states), y, layout.table, none, none, none, none,
        *call.scores(), call.q.shape[1],
        **call.window_constants(), TRANSFER=False, GRADIENTS=False, num_warps=_warps(call), num_stages=1,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class MapGradients:
    """Of the tensors in `Maps`, in float32."""

    w_q: Tensor
    w_k: Tensor
    gamma: Tensor
    alpha: Tensor
    b_q: Tensor | None
    b_k: Tensor | None


def backward(
    call: Call, y: Tensor, grad: Tensor, initial: State | None, *, maps: bool
) -> tuple[Tensor, Tensor, Tensor, MapGradients | None]:
    """Gradients of q, k and v; of the maps only with `maps` (low-rank finetuning freezes them)."""
    grad, y = _aligned(grad.to(call.q.dtype)), _aligned(y)
    batch, tokens = call.q.shape[:2]
    device, columns = call.q.device, call.columns
    # Tokens that belong to no sequence have no gradient.
    make = torch.empty if call.sequences.lengths is None else torch.zeros
    dq = make(call.q.shape, dtype=call.q.dtype, device=device)
    dk, dv = (make(call.k.shape, dtype=call.q.dtype, device=device) for _ in range(2))
    layout = call.sequences.layout(call.chunk, 1)
    wide = torch.float32
    den, delta, top, total = (call.per_token() for _ in range(4))
    argmax = call.per_token(torch.int32)
    dxq = make(batch, tokens, call.heads, columns, dtype=call.q.dtype, device=device) if maps else dq
    dxk = make(batch, tokens, call.state_heads, columns, dtype=call.q.dtype, device=device) if maps else dk
    euler = torch.zeros(layout.segments, call.heads, dtype=wide, device=device)
    dbq, dbk = (
        torch.zeros(layout.segments, heads, columns if call.biased else 0, dtype=wide, device=device)
        for heads in (call.heads, call.state_heads)
    )
    constants = call.window_constants() | {"MAPS": maps, "num_warps": _warps(call), "num_stages": 1}
    grads = tiles(grad, call.chunk)
    states = chunk_states(call, initial, None)
    query_gradient_kernel[(call.heads, layout.segments)](
        *call.operands(states), tiles(y, call.chunk), grads, layout.table,
        dq, dxq, den, delta, top, total, argmax, euler, dbq, *call.scores(), tokens, **constants,
    )  # fmt: skip
    states = reverse_states(call, grad, den, delta)
    key_gradient_kernel[(call.key_heads, layout.segments)](
        *call.operands(states), grads, layout.table,
        dk, dv, dxk, den, delta, top, total, argmax, dbk, *call.scores(), tokens, **constants,
    )  # fmt: skip
    if not maps:
        return dq, dk, dv, None
    euler = euler.sum(0)
    alpha = call.maps.alpha
    assert alpha is not None
    return (
        dq,
        dk,
        dv,
        MapGradients(
            _map_product(call, call.q, dxq),
            _map_product(call, call.k, dxk),
            torch.zeros_like(euler) if call.spec.window == "none" else -euler / call.maps.gamma,
            euler / alpha,
            dbq.sum(0) if call.biased else None,
            dbk.sum(0) if call.biased else None,
        ),
    )


def transfer(call: Call, target: Tensor, *, gradients: bool) -> tuple[Tensor, MapGradients | None]:
    """Sum of squared errors of the output against `target` [B, T, H, D], and the gradients of half of it.

    Terraced windows only, where the window itself needs no gradient (method.md, section 3). Neither the output nor the
    features are stored.
    """
    target = _aligned(target.to(call.q.dtype))
    states = chunk_states(call, None, None)
    layout = call.sequences.layout(call.chunk, 1)
    tokens = call.q.shape[1]
    errors = call.outputs() if gradients else target
    den, delta = (call.per_token() if gradients else call.maps.gamma for _ in range(2))
    loss = call.parts(layout, call.heads)
    output_kernel[(call.heads, layout.segments)](
        *call.operands(states), errors, layout.table, tiles(target, call.chunk), den, delta, loss,
        *call.scores(), tokens, **call.window_constants(), TRANSFER=True, GRADIENTS=gradients,
        num_warps=_warps(call), num_stages=1,
    )  # fmt: skip
    if not gradients:
        return loss.sum(), None
    layout = call.sequences.layout(call.chunk, _chunks_per_program(call, call.heads))

    def map_gradient(x: Tensor, other: Tensor, w: Tensor, bias: Tensor | None, states: State, query: bool) -> Any:
        heads = w.shape[0]
        dw = call.parts(layout, heads, call.dim, call.columns)
        db, euler = call.parts(layout, heads, call.columns), call.parts(layout, heads)
        map_gradient_kernel[(heads, layout.segments)](
            tiles(x, call.chunk), tiles(other, call.chunk), call.map_tiles(w), call.bias(bias),
            call.state_tiles(states[0], call.padded_dim), states[1], den, delta, call.maps.alpha, dw, db, euler,
            layout.table, tokens, HEADS=heads, PER_X=heads // x.shape[2], PER_STATE=heads // call.state_heads,
            QUERY=query, **call.map_constants(), num_warps=_warps(call), num_stages=1,
        )  # fmt: skip
        return dw.sum(0), db.sum(0) if call.biased else None, euler.sum(0)

    maps, alpha = call.maps, call.maps.alpha
    assert alpha is not None
    w_q, b_q, euler = map_gradient(call.q, errors, maps.w_q, maps.b_q, states, query=True)
    del states
    reverse = reverse_states(call, errors, den, delta)
    w_k, b_k, _ = map_gradient(call.k, call.v, maps.w_k, maps.b_k, reverse, query=False)
    # By Euler's theorem: the output does not change when both factors are scaled alike.
    return loss.sum(), MapGradients(w_q, w_k, -euler / maps.gamma, euler / alpha, b_q, b_k)


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

"""The operands of one call as the fused kernels take them: dtypes, padding, descriptors and constants.

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

from lolcats_kernels.hybrid_attention.config import Maps, Spec
from lolcats_kernels.hybrid_attention.fused.features import ACTIVATIONS, WINDOWS
from lolcats_kernels.hybrid_attention.fused.layout import Layout, Sequences

# Chunk of pure linear attention, which has no window to take it from.
CHUNK_WITHOUT_WINDOW = 64
# Bytes that a tile's row has at least: from narrower ones (swizzled over 64 bytes or fewer) Triton 3.6 makes products
# for sm_90 that are wrong or read beyond shared memory, depending on the shape.
ROW_BYTES = 128
State = tuple[Tensor, Tensor]


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
        q, k, v = (aligned(x) for x in (q, k.to(q.dtype), v.to(q.dtype)))

        columns = padded_width(maps.w_q.shape[-1], q.dtype)

        def padded(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if x is None:
                return None
            return F.pad(x.detach().to(dtype), (0, columns - x.shape[-1])).contiguous()

        w_q, w_k = (padded(w, q.dtype) for w in (maps.w_q, maps.w_k))
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
        return padded_width(self.dim, self.q.dtype)

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


def padded_width(columns: int, dtype: torch.dtype) -> int:
    """Columns of a tile that holds `columns`: a power of two, and `ROW_BYTES` at least."""
    return max(ROW_BYTES // dtype.itemsize, triton.next_power_of_2(columns))


def tiles(x: Tensor, chunk: int, width: int | None = None) -> TensorDescriptor:
    """Descriptor of [B, T, heads, D] for blocks of `chunk` tokens and `width` columns of one head."""
    width = padded_width(x.shape[3], x.dtype) if width is None else width
    # The stride of a dimension of one is never used, but has to be a legal one.
    strides = [x.stride(i) if x.shape[i] > 1 else x.shape[i + 1 :].numel() for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, chunk, 1, width])


def aligned(x: Tensor) -> Tensor:
    """`x`, copied if a descriptor cannot address it: 16-byte strides, columns side by side."""
    item = x.element_size()
    pitches = [x.stride(i) * item for i in range(x.dim() - 1) if x.shape[i] > 1]
    fits = x.stride(-1) == 1 and all(pitch % 16 == 0 for pitch in pitches) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()

"""The operator's three entries, `attend`, `decode_` and `transfer_error`: checks, layouts and the choice of form.

Sequences reach the chunked form right-padded, each from the start of its row. Packed rows (`cu_seqlens`) are brought
into that layout and back; a continued sequence is put behind the ring of its state.

# B batch, T tokens, H query heads, Hk key/value heads, D head dim, F columns of a map, C window
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.chunked import chunked_forward, first_tokens, fold_state
from lolcats_kernels.hybrid_attention.config import WINDOWS, HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.naive import naive_attention
from lolcats_kernels.hybrid_attention.packing import packed_index, unpack_rows
from lolcats_kernels.hybrid_attention.recurrent import decode_step
from lolcats_kernels.hybrid_attention.state import HybridState, fill_ring, folded_tokens, ring_slots

logger = logging.getLogger(__name__)
BACKENDS = ("auto", "triton", "chunked", "naive")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, HybridState]:
    """The hybrid attention of whole, padded, packed or continued sequences.

    Args:
        q: [B, T, H, D] after rotary embeddings; `k`, `v`: [B, T, Hk, D], not repeated to the query heads.
        cu_seqlens, lengths, initial_state, return_state, backend: as in `functional.hybrid_attention`.

    Returns:
        y [B, T, H, D] in the dtype of `q`; with `return_state` also the state (of n sequences when packed).

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or does not take this call.
    """
    _check(q, k, v, weights, config.window, cu_seqlens, lengths, backend)
    if backend == "naive":
        if return_state or initial_state is not None or cu_seqlens is not None or lengths is not None:
            raise ValueError("`backend` naive takes whole sequences only: no state, cu_seqlens or lengths")
        return _naive(q, k, v, weights, config)
    if initial_state is not None and q.shape[1] == 1 and cu_seqlens is None and lengths is None:
        y, state = decode_step(q, k, v, weights, config, initial_state)
        return (y.to(q.dtype), state) if return_state else y.to(q.dtype)

    fused = _fused(q, v, weights, config, backend, state=initial_state, return_state=return_state)
    packed = None
    if cu_seqlens is not None:
        if fused and initial_state is None and not return_state:
            return _fused_ops().forward(q, k, v, weights, config, cu_seqlens=cu_seqlens)[0]
        packed, lengths = packed_index(cu_seqlens)
        q, k, v = (x[0][packed] for x in (q, k, v))
    batch, columns = q.shape[:2]
    if initial_state is None and not return_state:
        y, _ = _run(fused, q, k, v, weights, config, lengths, None, output_final_state=False)
        return y if packed is None or lengths is None else unpack_rows(y, packed, lengths)

    counts = torch.full((batch,), columns, device=q.device) if lengths is None else lengths
    counts = counts.to(torch.int64)
    # Columns are positions from `first` on, the oldest token of the ring; S and z hold everything before it.
    first, cached, sums, within, sinks = torch.zeros_like(counts), None, None, lengths, None
    if initial_state is not None:
        first = folded_tokens(initial_state.length, config.window, config.window_size)
        cached = initial_state.length - first
        k, v, q = _behind_ring(initial_state, q, k, v, first, cached, ring_slots(config.window, config.window_size))
        sums, within = (initial_state.s, initial_state.z), cached + counts
    if config.window_sinks:
        sinks = _sinks(k, v, config.window_sinks, first, initial_state)
    y, end = _run(
        fused, q, k, v, weights, config, within, sums, output_final_state=return_state, first=first, sinks=sinks
    )
    if cached is not None:
        rows = cached[:, None] + torch.arange(columns, device=q.device)
        y = y.gather(1, rows[..., None, None].expand(-1, -1, *y.shape[2:]))
    if packed is not None:
        y = unpack_rows(y, packed, counts)
    if end is None:
        return y
    length = first + (counts if cached is None else cached + counts)
    ring_k, ring_v = (fill_ring(x, first, length, config.window, config.window_size, x.dtype) for x in (k, v))
    return y, HybridState(*end, ring_k, ring_v, length, *(sinks or ()))


def decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    state: HybridState,
    *,
    backend: str = "auto",
) -> Tensor:
    """One new token of each sequence; `state` becomes the state after it, on a GPU in its own memory.

    The fused kernel has no host branch and no allocation but the output's: it can be captured in a CUDA graph.

    Args:
        q: [B, 1, H, D]; `k`, `v`: [B, 1, Hk, D]. No gradients.

    Returns:
        y [B, 1, H, D] in the dtype of `q`.
    """
    with torch.no_grad():
        if _fused(q, v, weights, config, backend):
            return _fused_ops().decode(q, k, v, weights, config, state)
        y, after = decode_step(q, k, v, weights, config, state)
    for name, value in vars(after).items():
        setattr(state, name, value)
    return y.to(q.dtype)


def transfer_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y_true: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error between the hybrid attention's output and the softmax attention's (equation 7, per layer).

    Args:
        y_true: [B, T, H, D], the softmax outputs before the output projection; the rest as in `attend`.
        lengths: only real tokens count.

    Returns:
        Scalar in float32 (float64 for float64 inputs), differentiable in the weights.
    """
    frozen = not any(x.requires_grad for x in (q, k, v, y_true))
    if config.window == "terraced" and frozen and _fused(q, v, weights, config, backend):
        errors = _fused_ops().transfer_errors(q, k, v, y_true, weights, config, cu_seqlens=cu_seqlens, lengths=lengths)
        count = y_true.numel() if lengths is None else lengths.sum() * y_true[0, 0].numel()
        return errors / count
    y = cast(Tensor, attend(q, k, v, weights, config, cu_seqlens=cu_seqlens, lengths=lengths, backend=backend))
    compute_dtype = torch.promote_types(y.dtype, torch.float32)
    squared = (y.to(compute_dtype) - y_true.to(compute_dtype)).square()
    if lengths is None:
        return squared.mean()
    real = torch.arange(y.shape[1], device=y.device)[None, :] < lengths[:, None]
    return squared[real].mean()


def _naive(q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig) -> Tensor:
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    cast_weights = replace(
        weights, **{name: getattr(weights, name).to(compute_dtype) for name in ("w_q", "w_k", "window_factor")}
    )
    return naive_attention(*(x.to(compute_dtype) for x in (q, k, v)), cast_weights, config).to(q.dtype)


def _run(
    fused: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    lengths: Tensor | None,
    initial_state: tuple[Tensor, Tensor] | None,
    *,
    output_final_state: bool,
    first: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Outputs of right-padded sequences and, with `output_final_state`, S and z behind their last tokens.

    `first` and `sinks` are as in `chunked_forward`.
    """
    if fused:
        states = {"initial_state": initial_state, "output_final_state": output_final_state}
        return cast(Any, _fused_ops().forward(q, k, v, weights, config, lengths=lengths, **states))
    dtype, compute_dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(compute_dtype) for x in (q, k, v))
    if sinks is not None:
        sinks = sinks[0].to(compute_dtype), sinks[1].to(compute_dtype)
    y, phi_k = chunked_forward(q, k, v, weights, config, initial_state, first, sinks)
    if not output_final_state:
        return y.to(dtype), None
    if lengths is None:
        lengths = torch.full((q.shape[0],), q.shape[1], device=q.device)
    return y.to(dtype), fold_state(v, phi_k, config, lengths.to(torch.int64), initial_state, weights.decay)


def _sinks(k: Tensor, v: Tensor, count: int, first: Tensor, state: HybridState | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, count, Hk, D] of each sequence's first tokens; those that there are not yet are undefined.

    Args:
        k, v: [B, T, Hk, D], of the tokens from position `first` [B] on.
    """
    here = first_tokens(k, count), first_tokens(v, count)
    if state is None or state.sink_k is None or state.sink_v is None:
        return here
    begins = (first == 0)[:, None, None, None]
    return torch.where(begins, here[0], state.sink_k), torch.where(begins, here[1], state.sink_v)


def _fused_ops() -> Any:
    """The module of the Triton operators, imported only where they run: triton is not everywhere."""
    from lolcats_kernels.hybrid_attention.fused import ops

    return ops


@lru_cache(maxsize=256)
def _announce(level: int, message: str) -> None:
    """One log line for each thing to say."""
    logger.log(level, message)


def _say(level: int, message: str) -> None:
    if not torch.compiler.is_compiling():
        _announce(level, message)


def _fused(
    q: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    backend: str,
    *,
    state: HybridState | None = None,
    return_state: bool = False,
) -> bool:
    """Whether the fused kernels take this call.

    Raises:
        ValueError: they were asked for and cannot.
    """
    if backend == "chunked" or (backend == "auto" and not q.is_cuda):
        _say(logging.INFO, f"hybrid attention on {q.device.type}: chunked PyTorch form ({backend})")
        return False
    reason = None
    try:
        reason = _fused_ops().launch.unsupported(q, v, weights, config)
    except ImportError as error:
        # No triton, or this is the copy beside a saved model, which holds the other forms.
        reason = f"the fused kernels cannot be imported ({error})"
    tensors = (q, v, *weights.tensors())
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    through_state = state is not None and (state.s.requires_grad or state.z.requires_grad)
    if reason is None and wanted and (return_state or through_state):
        reason = "gradients do not pass through a state; use torch.no_grad() for a state alone"
    if reason is None and wanted and config.window == "none" and q.dtype != torch.float32:
        # The gradient of a query is a difference of two terms over its denominator, and without a window nothing keeps
        # that from being next to zero: rounding to half precision is then all that is left (t2r: 1e10 times too large).
        reason = f"without a window gradients need float32, got {q.dtype}"
    if reason is None:
        _say(logging.INFO, f"hybrid attention on {q.device.type}: fused Triton kernels")
        return True
    if backend == "triton":
        raise ValueError(f"`backend` triton cannot take this call: {reason}")
    _say(logging.WARNING, f"hybrid attention on {q.device.type}: chunked PyTorch form, since {reason}")
    return False


def _behind_ring(
    state: HybridState, q: Tensor, k: Tensor, v: Tensor, first: Tensor, cached: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence's ring in order of position, followed by its new tokens; queries of the ring are zeros."""
    if not slots:
        return k, v, q
    total = int(cached.max()) + k.shape[1]
    column = torch.arange(total, device=k.device)[None, :]
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    old = column < cached[:, None]
    slot = (first[:, None] + column) % slots
    new = (column - cached[:, None]).clamp(0, k.shape[1] - 1)

    def join(ring: Tensor | None, x: Tensor) -> Tensor:
        past = torch.zeros_like(x[:, :1]) if ring is None else ring.to(x.dtype)[batch, slot]
        return torch.where(old[..., None, None], past, x[batch, new])

    return join(state.ring_k, k), join(state.ring_v, v), join(None, q)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    window: str,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or q.shape[:2] != k.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q must be [B, T, H, D] and k, v [B, T, Hk, D] with equal B and T, got {shapes}")
    heads, dim = q.shape[2:]
    w_q, w_k = weights.w_q, weights.w_k
    if heads % k.shape[2] or k.shape[3] != dim:
        raise ValueError(f"H must be a multiple of Hk and D equal, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if w_q.shape[:2] != (heads, dim) or w_k.shape[0] not in (heads, k.shape[2]) or w_k.shape[1:] != w_q.shape[1:]:
        raise ValueError(
            f"w_q must be [H, D, F] and w_k [H or Hk, D, F], got {tuple(w_q.shape)} and {tuple(w_k.shape)}"
            f" for H = {heads}, Hk = {k.shape[2]}, D = {dim}"
        )
    if window not in WINDOWS:
        raise ValueError(f"`window` of causal attention must be one of {', '.join(WINDOWS)}, got {window!r}")
    if weights.share is not None and window != "terraced":
        raise ValueError(f"a mixture (`share`) needs `window` terraced, got {window!r}")
    factor, decay = weights.window_factor, weights.decay
    if factor.shape != (heads,):
        raise ValueError(f"`window_factor` must be [H] = [{heads}], got {tuple(factor.shape)}")
    if decay is not None and decay.shape != w_k.shape[:1]:
        raise ValueError(f"`decay` must be [{w_k.shape[0]}], one for each map of w_k, got {tuple(decay.shape)}")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if cu_seqlens is not None and (q.shape[0] != 1 or lengths is not None):
        raise ValueError(f"`cu_seqlens` needs one packed row (B = 1) and no `lengths`, got B = {q.shape[0]}")
    if lengths is not None and lengths.shape != (q.shape[0],):
        raise ValueError(f"`lengths` must be [B] = [{q.shape[0]}], got {tuple(lengths.shape)}")

"""`hybrid_attention` and `attention_transfer_loss`: one entry for every form, layout and device.

Sequences reach the chunked form right-padded, each from the start of its row. Packed rows (`cu_seqlens`) are brought
into that layout and back; a continued sequence is put behind the ring of its state.

# B batch, T tokens, H query heads, Hk key/value heads, D head dim, F columns of a map, C window
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.chunked import chunked_forward, fold_state
from lolcats_kernels.hybrid_attention.config import Maps, Spec
from lolcats_kernels.hybrid_attention.feature_maps import FEATURE_MAPS
from lolcats_kernels.hybrid_attention.naive import hybrid_attention_naive
from lolcats_kernels.hybrid_attention.packing import packed_index, unpack_rows
from lolcats_kernels.hybrid_attention.recurrent import decode_step
from lolcats_kernels.hybrid_attention.state import HybridState, fill_ring, folded_tokens, ring_slots

logger = logging.getLogger(__name__)
BACKENDS = ("auto", "triton", "chunked", "naive")


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = "terraced",
    window_size: int = 64,
    feature_map: str = "hedgehog",
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, HybridState]:
    """Softmax window plus learnable linear attention over everything older (arXiv 2410.10254, equation 6).

    Args:
        q: [B, T, H, D] after rotary embeddings; `k`, `v`: [B, T, Hk, D], not repeated to the query heads.
        w_q: [H, D, F]; `w_k`: [H, D, F] or [Hk, D, F]; `b_q`, `b_k`: biases [heads, F] or None.
        window_factor: [H], gamma, already through the sigmoid. `linear_factor`: [H] or None for 1.
        decay: one for each map of `w_k`, in (0, 1): a token's linear weight shrinks by it with each later token
            (as in arXiv 2307.08621), or None for 1.
        scale: of the window's scores; 1/sqrt(D) unless given. `softcap`: bound on them (Gemma 2) or None.
        cu_seqlens: [n + 1] boundaries of n sequences packed into one row (B = 1).
        lengths: [B] real tokens of each row, which must stand at its start; outputs after them are undefined.
        initial_state: continue the sequences of this state; its positions may differ.
        backend: ``auto`` (Triton on CUDA, chunked elsewhere), ``triton``, ``chunked`` (linear time, any device) or
            ``naive`` (quadratic; no packing, padding or state).

    Returns:
        y [B, T, H, D] in the dtype of `q`; with `return_state` also the state (of n sequences when packed).

    Raises:
        ValueError: shapes do not fit or an option is unknown.
    """
    _check(q, k, v, w_q, w_k, window_factor, decay, window, window_size, feature_map, cu_seqlens, lengths, backend)
    maps = Maps(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    spec = Spec(window, window_size, feature_map, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    if backend == "naive":
        if return_state or initial_state is not None or cu_seqlens is not None or lengths is not None:
            raise ValueError("`backend` naive takes whole sequences only: no state, cu_seqlens or lengths")
        return _naive(q, k, v, maps, spec)
    if initial_state is not None and q.shape[1] == 1 and cu_seqlens is None and lengths is None:
        y, state = decode_step(q, k, v, maps, spec, initial_state)
        return (y.to(q.dtype), state) if return_state else y.to(q.dtype)

    fused = _fused(q, v, maps, spec, backend, state=initial_state, return_state=return_state)
    packed = None
    if cu_seqlens is not None:
        if fused and initial_state is None and not return_state:
            return _fused_ops().forward(q, k, v, maps, spec, cu_seqlens=cu_seqlens)[0]
        packed, lengths = packed_index(cu_seqlens)
        q, k, v = (x[0][packed] for x in (q, k, v))
    batch, columns = q.shape[:2]
    if initial_state is None and not return_state:
        y, _ = _run(fused, q, k, v, maps, spec, lengths, None, end=False)
        return y if packed is None or lengths is None else unpack_rows(y, packed, lengths)

    counts = torch.full((batch,), columns, device=q.device) if lengths is None else lengths
    counts = counts.to(torch.int64)
    # Columns are positions from `first` on, the oldest token of the ring; S and z hold everything before it.
    first, held, older, within = torch.zeros_like(counts), None, None, lengths
    if initial_state is not None:
        first = folded_tokens(initial_state.length, window, window_size)
        held = initial_state.length - first
        k, v, q = _behind_ring(initial_state, q, k, v, first, held, ring_slots(window, window_size))
        older, within = (initial_state.s, initial_state.z), held + counts
    y, end = _run(fused, q, k, v, maps, spec, within, older, end=return_state)
    if held is not None:
        rows = held[:, None] + torch.arange(columns, device=q.device)
        y = y.gather(1, rows[..., None, None].expand(-1, -1, *y.shape[2:]))
    if packed is not None:
        y = unpack_rows(y, packed, counts)
    if end is None:
        return y
    length = first + (counts if held is None else held + counts)
    ring_k, ring_v = (fill_ring(x, first, length, window, window_size, x.dtype) for x in (k, v))
    return y, HybridState(s=end[0], z=end[1], ring_k=ring_k, ring_v=ring_v, length=length)


def hybrid_decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    state: HybridState,
    *,
    linear_factor: Tensor | None = None,
    window: str = "terraced",
    window_size: int = 64,
    feature_map: str = "hedgehog",
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One new token of each sequence; `state` becomes the state after it, on a GPU in its own memory.

    The fused kernel has no host branch and no allocation but the output's: it can be captured in a CUDA graph.

    Args:
        q: [B, 1, H, D]; `k`, `v`: [B, 1, Hk, D]; the rest as in `hybrid_attention`. No gradients.

    Returns:
        y [B, 1, H, D] in the dtype of `q`.
    """
    maps = Maps(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    spec = Spec(window, window_size, feature_map, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    with torch.no_grad():
        if _fused(q, v, maps, spec, backend):
            return _fused_ops().decode(q, k, v, maps, spec, state)
        y, after = decode_step(q, k, v, maps, spec, state)
    for name, value in vars(after).items():
        setattr(state, name, value)
    return y.to(q.dtype)


def attention_transfer_loss(
    q: Tensor, k: Tensor, v: Tensor, y_true: Tensor, w_q: Tensor, w_k: Tensor, window_factor: Tensor, **options: Any
) -> Tensor:
    """Mean squared error between the hybrid attention's output and the softmax attention's (equation 7, per layer).

    Args:
        y_true: [B, T, H, D], the softmax outputs before the output projection; the rest as in `hybrid_attention`.
        options: of `hybrid_attention`; with `lengths` only real tokens count.

    Returns:
        Scalar in float32 (float64 for float64 inputs), differentiable in the maps and factors.
    """
    errors = _fused_errors(q, k, v, y_true, w_q, w_k, window_factor, options)
    count: Tensor | int = y_true.numel()
    if options.get("lengths") is not None:
        count = options["lengths"].sum() * y_true[0, 0].numel()
    if errors is not None:
        return errors / count
    y = cast(Tensor, hybrid_attention(q, k, v, w_q, w_k, window_factor, **options))
    wide = torch.promote_types(y.dtype, torch.float32)
    squared = (y.to(wide) - y_true.to(wide)).square()
    lengths = options.get("lengths")
    if lengths is None:
        return squared.mean()
    real = torch.arange(y.shape[1], device=y.device)[None, :] < lengths[:, None]
    return squared[real].mean()


def _fused_errors(
    q: Tensor, k: Tensor, v: Tensor, y_true: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor, options: dict[str, Any]
) -> Tensor | None:
    """Sum of squared errors by the fused transfer kernels; None where they do not apply."""
    given: dict[str, Any] = {
        "window": "terraced",
        "window_size": 64,
        "feature_map": "hedgehog",
        "backend": "auto",
    } | options
    scale = given.get("scale")
    spec = Spec(
        given["window"],
        given["window_size"],
        given["feature_map"],
        q.shape[-1] ** -0.5 if scale is None else scale,
        given.get("softcap"),
    )
    maps = Maps(w_q, w_k, gamma, given.get("linear_factor"), given.get("b_q"), given.get("b_k"), given.get("decay"))
    frozen = not any(x.requires_grad for x in (q, k, v, y_true))
    if spec.window != "terraced" or not frozen or not _fused(q, v, maps, spec, given["backend"]):
        return None
    where = {"cu_seqlens": given.get("cu_seqlens"), "lengths": given.get("lengths")}
    return cast(Tensor, _fused_ops().transfer_errors(q, k, v, y_true, maps, spec, **where))


def _naive(q: Tensor, k: Tensor, v: Tensor, maps: Maps, spec: Spec) -> Tensor:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    wide = (x.to(accumulate) for x in (q, k, v, maps.w_q, maps.w_k, maps.gamma))
    options = {"linear_factor": maps.alpha, "b_q": maps.b_q, "b_k": maps.b_k, "decay": maps.decay, **vars(spec)}
    return hybrid_attention_naive(*wide, **options).to(q.dtype)


def _run(
    fused: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Maps,
    spec: Spec,
    lengths: Tensor | None,
    older: tuple[Tensor, Tensor] | None,
    *,
    end: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Outputs of right-padded sequences and, with `end`, S and z behind their last tokens."""
    if fused:
        return cast(Any, _fused_ops().forward(q, k, v, maps, spec, lengths=lengths, state=older, end=end))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dtype = q.dtype
    q, k, v = (x.to(accumulate) for x in (q, k, v))
    y, phi_k = chunked_forward(q, k, v, maps, spec, state=older)
    if not end:
        return y.to(dtype), None
    if lengths is None:
        lengths = torch.full((q.shape[0],), q.shape[1], device=q.device)
    return y.to(dtype), fold_state(v, phi_k, spec, lengths.to(torch.int64), older, maps.decay)


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
    maps: Maps,
    spec: Spec,
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
        reason = _fused_ops().launch.unsupported(q, v, maps, spec)
    except ImportError as error:
        # No triton, or this is the copy beside a saved model, which holds the other forms.
        reason = f"the fused kernels cannot be imported ({error})"
    tensors = (q, v, *maps.tensors())
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    through_state = state is not None and (state.s.requires_grad or state.z.requires_grad)
    if reason is None and wanted and (return_state or through_state):
        reason = "gradients do not pass through a state; use torch.no_grad() for a state alone"
    if reason is None and wanted and spec.window == "none" and q.dtype != torch.float32:
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
    state: HybridState, q: Tensor, k: Tensor, v: Tensor, first: Tensor, held: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence's ring in order of position, followed by its new tokens; queries of the ring are zeros."""
    if not slots:
        return k, v, q
    total = int(held.max()) + k.shape[1]
    column = torch.arange(total, device=k.device)[None, :]
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    old = column < held[:, None]
    slot = (first[:, None] + column) % slots
    new = (column - held[:, None]).clamp(0, k.shape[1] - 1)

    def join(ring: Tensor | None, x: Tensor) -> Tensor:
        past = torch.zeros_like(x[:, :1]) if ring is None else ring.to(x.dtype)[batch, slot]
        return torch.where(old[..., None, None], past, x[batch, new])

    return join(state.ring_k, k), join(state.ring_v, v), join(None, q)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    decay: Tensor | None,
    window: str,
    window_size: int,
    feature_map: str,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or q.shape[:2] != k.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q must be [B, T, H, D] and k, v [B, T, Hk, D] with equal B and T, got {shapes}")
    heads, dim = q.shape[2:]
    if heads % k.shape[2] or k.shape[3] != dim:
        raise ValueError(f"H must be a multiple of Hk and D equal, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if w_q.shape[:2] != (heads, dim) or w_k.shape[0] not in (heads, k.shape[2]) or w_k.shape[1:] != w_q.shape[1:]:
        raise ValueError(
            f"w_q must be [H, D, F] and w_k [H or Hk, D, F], got {tuple(w_q.shape)} and {tuple(w_k.shape)}"
            f" for H = {heads}, Hk = {k.shape[2]}, D = {dim}"
        )
    if window_factor.shape != (heads,):
        raise ValueError(f"`window_factor` must be [H] = [{heads}], got {tuple(window_factor.shape)}")
    if decay is not None and decay.shape != w_k.shape[:1]:
        raise ValueError(f"`decay` must be [{w_k.shape[0]}], one for each map of w_k, got {tuple(decay.shape)}")
    if window not in ("terraced", "sliding", "none"):
        raise ValueError(f"`window` must be one of terraced, sliding, none, got {window!r}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"`feature_map` must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if window_size < 1:
        raise ValueError(f"`window_size` must be at least 1, got {window_size}")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if cu_seqlens is not None and (q.shape[0] != 1 or lengths is not None):
        raise ValueError(f"`cu_seqlens` needs one packed row (B = 1) and no `lengths`, got B = {q.shape[0]}")
    if lengths is not None and lengths.shape != (q.shape[0],):
        raise ValueError(f"`lengths` must be [B] = [{q.shape[0]}], got {tuple(lengths.shape)}")

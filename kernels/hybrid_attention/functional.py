"""The operator with tensors and settings as plain arguments; `interface` computes it from a `HybridWeights` and config.

# B batch, T tokens, H query heads, Hk key/value heads, D head dim, F columns of a map, n packed sequences
"""

from __future__ import annotations

from torch import Tensor

from lolcats_kernels.hybrid_attention.bidirectional import TokenGrid, attend_bidirectional
from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.interface import attend, decode_, transfer_error
from lolcats_kernels.hybrid_attention.naive import naive_attention
from lolcats_kernels.hybrid_attention.state import HybridState


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = HybridConfig.window,
    window_size: int = HybridConfig.window_size,
    feature_map: str = HybridConfig.feature_map,
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
    weights = HybridWeights(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    config = HybridConfig(_scale(q, scale), softcap, window, window_size, feature_map)
    return attend(
        q,
        k,
        v,
        weights,
        config,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        initial_state=initial_state,
        return_state=return_state,
        backend=backend,
    )


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
    window: str = HybridConfig.window,
    window_size: int = HybridConfig.window_size,
    feature_map: str = HybridConfig.feature_map,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`decode_` with the arguments of `hybrid_attention`."""
    weights = HybridWeights(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    config = HybridConfig(_scale(q, scale), softcap, window, window_size, feature_map)
    return decode_(q, k, v, weights, config, state, backend=backend)


def attention_transfer_loss(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y_true: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = HybridConfig.window,
    window_size: int = HybridConfig.window_size,
    feature_map: str = HybridConfig.feature_map,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`transfer_error` with the arguments of `hybrid_attention`."""
    weights = HybridWeights(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    config = HybridConfig(_scale(q, scale), softcap, window, window_size, feature_map)
    return transfer_error(q, k, v, y_true, weights, config, cu_seqlens=cu_seqlens, lengths=lengths, backend=backend)


def hybrid_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = HybridConfig.window,
    window_size: int = HybridConfig.window_size,
    feature_map: str = HybridConfig.feature_map,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`naive_attention`, the definition, with the arguments of `hybrid_attention`."""
    weights = HybridWeights(w_q, w_k, window_factor, linear_factor, b_q, b_k, decay)
    config = HybridConfig(_scale(q, scale), softcap, window, window_size, feature_map)
    return naive_attention(q, k, v, weights, config)


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    window_factor: Tensor,
    *,
    linear_factor: Tensor | None = None,
    window: str = "none",
    window_size: int = 8,
    prefix: int = 0,
    grid: tuple[int, int] | Tensor | None = None,
    lengths: Tensor | None = None,
    feature_map: str = HybridConfig.feature_map,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Linear attention in both directions, with the softmax of a patch's own tile beside it where asked for.

    Args:
        q: [B, N, H, D]; `k`, `v`: [B, N, Hk, D]; the prefix tokens of a row, then its patches, row by row.
        w_q, w_k, b_q, b_k, window_factor, linear_factor, feature_map, scale: as in `hybrid_attention`.
        window: ``none`` or ``tiled`` (the softmax part sees the tile of `window_size` x `window_size` patches, and the
            prefix). prefix: tokens before the patches, whose own queries keep softmax attention over all tokens.
        grid: rows and columns of patches, or int64 [B, 2] where images differ; ``tiled`` needs it.
        lengths: int64 [B] real tokens of each row, which stand at its start; outputs after them are zero.

    Returns:
        [B, N, H, D] in the dtype of `q`.

    Raises:
        ValueError: shapes do not fit or an option is unknown.
    """
    weights = HybridWeights(w_q, w_k, window_factor, linear_factor, b_q, b_k)
    config = HybridConfig(_scale(q, scale), None, window, window_size, feature_map)
    return attend_bidirectional(q, k, v, weights, config, TokenGrid(prefix, grid, lengths))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale

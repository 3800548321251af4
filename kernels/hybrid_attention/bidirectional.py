"""The hybrid attention of tokens that see each other in both directions: the patches of images.

A row is `prefix` tokens (CLS, registers) and then the patches of a grid, row by row. A patch sees

    y_i = (gamma sum_W e^(s_ij - m_i) v_j + alpha phi(q_i) (S - S_W))
        / (gamma sum_W e^(s_ij - m_i) + alpha phi(q_i) (z - z_W))

where W is its window: with ``tiled`` the patches of its own tile of `window_size` x `window_size` patches and the
prefix, with ``none`` nothing, and then it is linear attention over all tokens. S = sum phi(k_j) v_j^T and
z = sum phi(k_j) are made once. Queries of the prefix keep softmax over all keys, which costs as little: they are few.

# B batch, N tokens, P prefix, H query heads, Hk key/value heads, D head dim, E features, n tiles, M = window_size^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import BIDIRECTIONAL_WINDOWS, HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map
from lolcats_kernels.hybrid_attention.naive import NO_WINDOW_EPSILON


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a row stand.

    Attributes:
        prefix: tokens before the patches, P. size: rows and columns of patches of every image, or int64 [B, 2] where
            images of a batch differ; needed by ``tiled`` alone.
        lengths: int64 [B] real tokens of each row, which stand at its start (NaFlex); None: all.
    """

    prefix: int = 0
    size: tuple[int, int] | Tensor | None = None
    lengths: Tensor | None = None

    def real(self, tokens: int, device: torch.device) -> Tensor | None:
        """[B, N], False at padding; None where nothing is padded."""
        return None if self.lengths is None else torch.arange(tokens, device=device) < self.lengths[:, None]

    def sizes(self, device: torch.device) -> Tensor:
        """[B or 1, 2], rows and columns."""
        return torch.as_tensor(cast(Tensor, self.size), device=device).view(-1, 2)


def attend_bidirectional(
    q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig, grid: TokenGrid
) -> Tensor:
    """The attention of the formula above in linear time, by matrix products.

    Args:
        q: [B, N, H, D]; `k`, `v`: [B, N, Hk, D], not repeated to the query heads.
        config: `window` is ``none`` or ``tiled``.

    Returns:
        [B, N, H, D] in the dtype of `q`, computed in at least float32; zero at padding.

    Raises:
        ValueError: shapes, grid or options do not fit.
    """
    _check(q, k, v, weights, config, grid)
    dtype, heads = q.dtype, q.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    real = grid.real(q.shape[2], q.device)
    if real is not None:
        q, k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (q, k, v))
    phi_q, phi_k = _features(q, k, weights, config)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if real is not None:
        phi_k = phi_k * real[:, None, :, None]
    sums = phi_k.mT @ v, phi_k.sum(2)[..., None]
    patches = slice(grid.prefix, None)
    if config.window == "none":
        alpha = weights.linear_factor_or_ones().to(q.dtype)[:, None, None]
        numerator, denominator = (alpha * (phi_q[:, :, patches] @ x) for x in sums)
        y = numerator / (denominator + NO_WINDOW_EPSILON)
    else:
        y = _tiled(q, k, v, phi_q, phi_k, sums, weights, config, grid)
    if grid.prefix:
        seen = None if real is None else real[:, None, None, :]
        first = q[:, :, : grid.prefix]
        y = torch.cat([F.scaled_dot_product_attention(first, k, v, attn_mask=seen, scale=config.scale), y], 2)
    if real is not None:
        y = y * real[:, None, :, None]
    return y.transpose(1, 2).to(dtype)


def bidirectional_weights(
    q: Tensor, k: Tensor, weights: HybridWeights, config: HybridConfig, grid: TokenGrid
) -> Tensor:
    """Attention weights [B, H, N, N] of the same function by masks: the definition; rows of padding are zero.

    Args:
        q: [B, N, H, D]; `k`: [B, N, Hk, D]; float64 in tests.
    """
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    heads, tokens = q.shape[1:3]
    phi_q, phi_k = _features(q, k, weights, config)
    scores = q @ k.repeat_interleave(heads // k.shape[1], 1).mT * config.scale
    real = grid.real(tokens, q.device)
    real = torch.ones(1, tokens, dtype=torch.bool, device=q.device) if real is None else real
    seen = (real[:, :, None] & real[:, None, :])[:, None]
    inside = seen & window_of(tokens, config, grid, q.device)
    gamma, alpha = (x.to(q.dtype)[:, None, None] for x in (weights.window_factor, weights.linear_factor_or_ones()))
    linear = alpha * (phi_q @ phi_k.mT).masked_fill(~(seen & ~inside), 0)
    if config.window == "none":
        patches = linear / (linear.sum(-1, keepdim=True) + NO_WINDOW_EPSILON)
    else:
        scores_inside = scores.masked_fill(~inside, torch.finfo(q.dtype).min)
        total = linear + gamma * (scores_inside - scores_inside.amax(-1, keepdim=True)).exp() * inside
        patches = total / total.sum(-1, keepdim=True).clamp(min=NO_WINDOW_EPSILON)
    prefix = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    first = torch.arange(tokens, device=q.device)[:, None] < grid.prefix
    return torch.where(first, prefix, patches)


def window_of(tokens: int, config: HybridConfig, grid: TokenGrid, device: torch.device) -> Tensor:
    """[B or 1, 1, N, N], True where the softmax part of a patch (row) sees a token (column)."""
    if config.window == "none":
        return torch.zeros(1, 1, tokens, tokens, dtype=torch.bool, device=device)
    place = torch.arange(tokens, device=device) - grid.prefix
    columns = grid.sizes(device)[:, 1:]
    across = -(-columns // config.window_size)
    tile = (place // columns // config.window_size) * across + place % columns // config.window_size
    same = tile[:, :, None] == tile[:, None, :]
    return (torch.where(place < 0, True, same) & (place[:, None] >= 0))[:, None]


def bidirectional_error(
    q: Tensor, k: Tensor, v: Tensor, y_true: Tensor, weights: HybridWeights, config: HybridConfig, grid: TokenGrid
) -> Tensor:
    """Mean squared error between this attention's output and the softmax attention's, over real tokens.

    Args:
        y_true: [B, N, H, D], the softmax outputs before the output projection; the rest as in `attend_bidirectional`.

    Returns:
        Scalar in float32 (float64 for float64 inputs), differentiable in the weights.
    """
    y = attend_bidirectional(q, k, v, weights, config, grid)
    wide = torch.promote_types(y.dtype, torch.float32)
    squared = (y.to(wide) - y_true.to(wide)).square()
    real = grid.real(q.shape[1], q.device)
    return squared.mean() if real is None else squared[real].mean()


def _features(q: Tensor, k: Tensor, weights: HybridWeights, config: HybridConfig) -> tuple[Tensor, Tensor]:
    """Features [B, H, N, E] of queries [B, H, N, D] and of keys [B, Hk, N, D], the latter for every query head."""
    heads = q.shape[1]
    if len(weights.w_k) == heads:
        k = k.repeat_interleave(heads // k.shape[1], 1)
    phi_k = apply_feature_map(k, weights.w_k, config.feature_map, weights.b_k)
    phi_q = apply_feature_map(q, weights.w_q, config.feature_map, weights.b_q)
    return phi_q, phi_k.repeat_interleave(heads // phi_k.shape[1], 1)


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    sums: tuple[Tensor, Tensor],
    weights: HybridWeights,
    config: HybridConfig,
    grid: TokenGrid,
) -> Tensor:
    """Outputs of the patches [B, H, N - P, D]; everything [B, H, N, .], `sums` S [B, H, E, D] and z [B, H, E, 1]."""
    tiles = _Tiles.of(q.shape[2] - grid.prefix, config.window_size, grid.sizes(q.device))

    def by_tile(x: Tensor, prefix: bool = True) -> Tensor:
        """[B, H, n, (P +) M, .], the prefix in front of each tile."""
        first, rest = x[:, :, : grid.prefix], tiles.gather(x[:, :, grid.prefix :])
        return torch.cat([first[:, :, None].expand(-1, -1, rest.shape[2], -1, -1), rest], 3) if prefix else rest

    there = F.pad(tiles.there, (grid.prefix, 0), value=True)[:, None, :, None, :]
    queries = by_tile(q, prefix=False)
    gamma, alpha = (
        x.to(q.dtype)[:, None, None, None] for x in (weights.window_factor, weights.linear_factor_or_ones())
    )
    scores = queries @ by_tile(k).mT * config.scale
    scores = scores.masked_fill(~there, torch.finfo(q.dtype).min)
    softmax = gamma * (scores - scores.amax(-1, keepdim=True)).exp()
    features = by_tile(phi_q, prefix=False)
    # What the window sees is in S and z as well; its linear weights are taken out again.
    inside = (softmax - alpha * (features @ by_tile(phi_k).mT)) * there
    s, z = (x[:, :, None] for x in sums)
    numerator = alpha * (features @ s) + inside @ by_tile(v)
    denominator = alpha * (features @ z) + inside.sum(-1, keepdim=True)
    y = numerator / denominator.clamp(min=NO_WINDOW_EPSILON)
    return tiles.scatter(y)


@dataclass(frozen=True)
class _Tiles:
    """The patches of a grid by tiles.

    Attributes:
        index: int64 [B or 1, n, M] patch at each place of each tile. there: whether there is one.
        place: int64 [B or 1, N - P] the place of each patch, counted through the tiles.
    """

    index: Tensor
    there: Tensor
    place: Tensor

    @staticmethod
    def of(patches: int, side: int, sizes: Tensor) -> _Tiles:
        """Of `patches` places in each row, of which rows x columns in `sizes` [B or 1, 2] hold a patch."""
        rows, columns = (x[:, None, None] for x in sizes.unbind(1))
        across = -(-columns // side)
        count = -(-rows // side) * across
        tile = torch.arange(int(count.max()), device=sizes.device)[:, None]
        within = torch.arange(side * side, device=sizes.device)
        y, x = tile // across * side + within // side, tile % across * side + within % side
        there = (y < rows) & (x < columns) & (tile < count)
        number = torch.arange(patches, device=sizes.device)
        y_patch, x_patch = number // columns[:, 0], number % columns[:, 0]
        place = (y_patch // side * across[:, 0] + x_patch // side) * side**2 + y_patch % side * side + x_patch % side
        # Padding stands nowhere; what it gathers is masked.
        return _Tiles((y * columns + x) * there, there, place.clamp(max=len(tile) * side**2 - 1))

    def gather(self, x: Tensor) -> Tensor:
        """[B, H, N - P, .] → [B, H, n, M, .]."""
        return self._take(x, self.index.flatten(1)).unflatten(2, self.index.shape[1:])

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather`."""
        return self._take(x.flatten(2, 3), self.place)

    @staticmethod
    def _take(x: Tensor, index: Tensor) -> Tensor:
        if len(index) == 1:
            return x.index_select(2, index[0])
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _check(q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig, grid: TokenGrid) -> None:
    if config.window not in BIDIRECTIONAL_WINDOWS:
        known = ", ".join(BIDIRECTIONAL_WINDOWS)
        raise ValueError(f"`window` of bidirectional attention must be one of {known}, got {config.window!r}")
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or q.shape[:2] != k.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q must be [B, N, H, D] and k, v [B, N, Hk, D] with equal B and N, got {shapes}")
    heads, dim = q.shape[2:]
    if heads % k.shape[2] or k.shape[3] != dim:
        raise ValueError(f"H must be a multiple of Hk and D equal, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    w_q, w_k = weights.w_q, weights.w_k
    if w_q.shape[:2] != (heads, dim) or w_k.shape[0] not in (heads, k.shape[2]) or w_k.shape[1:] != w_q.shape[1:]:
        raise ValueError(
            f"w_q must be [H, D, F] and w_k [H or Hk, D, F], got {tuple(w_q.shape)} and {tuple(w_k.shape)}"
            f" for H = {heads}, Hk = {k.shape[2]}, D = {dim}"
        )
    causal = {"decay": weights.decay, "share": weights.share, "frequencies": weights.frequencies}
    causal |= {"softcap": config.softcap, "window_sinks": config.window_sinks or None}
    for name, value in causal.items():
        if value is not None:
            raise ValueError(f"bidirectional attention has no `{name}`; it must not be given")
    batch, tokens = q.shape[:2]
    if not 0 <= grid.prefix <= tokens:
        raise ValueError(f"`prefix` must be from 0 to the {tokens} tokens, got {grid.prefix}")
    if grid.lengths is not None and grid.lengths.shape != (batch,):
        raise ValueError(f"`lengths` must be [B] = [{batch}], got {tuple(grid.lengths.shape)}")
    if config.window == "none":
        return
    if grid.size is None:
        raise ValueError("`window` tiled needs the `grid` of the patches, got None")
    if isinstance(grid.size, Tensor):
        if grid.size.shape != (batch, 2):
            raise ValueError(f"`grid` must be rows and columns, or [B, 2] = [{batch}, 2], got {tuple(grid.size.shape)}")
    elif grid.size[0] * grid.size[1] != tokens - grid.prefix:
        shape = f"{grid.size[0]} x {grid.size[1]}"
        raise ValueError(f"`grid` must hold the {tokens - grid.prefix} patches of a row, got {shape}")

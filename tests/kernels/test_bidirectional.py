"""Attention in both directions: the form in linear time is the definition by masks, over grids of any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lolcats_kernels.hybrid_attention import (
    HybridConfig,
    HybridWeights,
    TokenGrid,
    attend,
    attend_bidirectional,
    bidirectional_attention,
    bidirectional_error,
    bidirectional_weights,
)
from lolcats_kernels.hybrid_attention.config import BIDIRECTIONAL_WINDOWS
from lolcats_kernels.hybrid_attention.feature_maps import FEATURE_MAPS

DIM, COLUMNS = 8, 6


def operands(
    tokens: int,
    *,
    heads: int = 4,
    key_heads: int = 4,
    map_heads: int = 4,
    batch: int = 2,
    affine: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, HybridWeights]:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    gamma = torch.sigmoid(draw(heads))
    weights = HybridWeights(
        draw(heads, DIM, COLUMNS),
        draw(map_heads, DIM, COLUMNS),
        gamma,
        1 - gamma if affine else None,
        draw(heads, COLUMNS) if bias else None,
        draw(map_heads, COLUMNS) if bias else None,
    )
    q, k, v = (draw(batch, tokens, count, DIM) for count in (heads, key_heads, key_heads))
    return q, k, v, weights


def settings(window: str, feature_map: str = "hedgehog", side: int = 4) -> HybridConfig:
    return HybridConfig(DIM**-0.5, None, window, side, feature_map)


def definition(q: Any, k: Any, v: Any, weights: Any, config: Any, grid: TokenGrid) -> torch.Tensor:
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).transpose(1, 2)
    return (bidirectional_weights(q, k, weights, config, grid) @ values).transpose(1, 2)


@pytest.mark.parametrize("window", BIDIRECTIONAL_WINDOWS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (8, 8), (3, 13), (16, 2)])
def test_linear_time_equals_the_definition(window: str, feature_map: str, prefix: int, size: tuple[int, int]) -> None:
    tokens = prefix + size[0] * size[1]
    q, k, v, weights = operands(tokens, affine=prefix == 1, bias=prefix == 5)
    config, grid = settings(window, feature_map), TokenGrid(prefix, size)
    found, expected = (f(q, k, v, weights, config, grid) for f in (attend_bidirectional, definition))
    assert (found - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("window", BIDIRECTIONAL_WINDOWS)
def test_key_heads_and_key_maps_may_serve_several_query_heads(window: str) -> None:
    for map_heads in (2, 4):
        q, k, v, weights = operands(26, key_heads=2, map_heads=map_heads)
        grid = TokenGrid(1, (5, 5))
        found, expected = (f(q, k, v, weights, settings(window), grid) for f in (attend_bidirectional, definition))
        assert (found - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("window", BIDIRECTIONAL_WINDOWS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_padded_image_gives_what_it_gives_alone_whatever_the_padding_holds(window: str, prefix: int) -> None:
    sizes = torch.tensor([[3, 5], [6, 4], [1, 2]])
    lengths = prefix + sizes.prod(1)
    q, k, v, weights = operands(prefix + 26, batch=3)
    config = settings(window)
    for x in (q, k, v):
        x[torch.arange(x.shape[1]) >= lengths[:, None]] = float("nan")
    y = attend_bidirectional(q, k, v, weights, config, TokenGrid(prefix, sizes, lengths))
    for row, (size, length) in enumerate(zip(sizes.tolist(), lengths.tolist(), strict=True)):
        alone = (x[row : row + 1, :length] for x in (q, k, v))
        expected = definition(*alone, weights, config, TokenGrid(prefix, tuple(size)))
        assert (y[row : row + 1, :length] - expected).norm() < 1e-10 * expected.norm()
        assert not y[row, length:].any()


def test_without_a_window_patches_may_stand_in_any_order() -> None:
    q, k, v, weights = operands(27)
    order = torch.cat([torch.arange(2), 2 + torch.randperm(25, generator=torch.Generator().manual_seed(0))])
    config, grid = settings("none"), TokenGrid(2)
    y = attend_bidirectional(q, k, v, weights, config, grid)
    shuffled = attend_bidirectional(q[:, order], k[:, order], v[:, order], weights, config, grid)
    assert (shuffled - y[:, order]).norm() < 1e-12 * y.norm()


def test_prefix_queries_keep_softmax_attention() -> None:
    q, k, v, weights = operands(28)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for window in BIDIRECTIONAL_WINDOWS:
        y = attend_bidirectional(q, k, v, weights, settings(window), TokenGrid(3, (5, 5)))
        assert (y[:, :3] - exact[:, :3]).norm() < 1e-12 * exact.norm()
        assert (y[:, 3:] - exact[:, 3:]).norm() > 0.05 * exact.norm()


def test_one_tile_over_the_whole_image_is_softmax_attention() -> None:
    q, k, v, weights = operands(18)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    y = attend_bidirectional(q, k, v, weights, settings("tiled", side=8), TokenGrid(2, (4, 4)))
    assert (y - exact).norm() < 1e-10 * exact.norm()


@pytest.mark.parametrize("window", BIDIRECTIONAL_WINDOWS)
def test_gradients_are_those_of_finite_differences(window: str) -> None:
    q, k, v, weights = operands(8, heads=2, key_heads=2, map_heads=2, batch=1, affine=True)
    lengths, grid = torch.tensor([7]), torch.tensor([[2, 3]])
    leaves = [x.requires_grad_() for x in (q, k, v, weights.w_q, weights.w_k, weights.window_factor.detach())]

    def run(q: Any, k: Any, v: Any, w_q: Any, w_k: Any, gamma: Any) -> torch.Tensor:
        options: dict[str, Any] = {"window": window, "window_size": 2, "prefix": 1, "grid": grid, "lengths": lengths}
        return bidirectional_attention(q, k, v, w_q, w_k, gamma, linear_factor=1 - gamma, **options)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("window", BIDIRECTIONAL_WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(window: str, dtype: torch.dtype) -> None:
    q, k, v, weights = operands(1 + 16 * 16, dtype=dtype)
    wide = HybridWeights(*(None if x is None else x.double() for x in vars(weights).values()))  # type: ignore[arg-type]
    config, grid = settings(window), TokenGrid(1, (16, 16))
    y = attend_bidirectional(q, k, v, weights, config, grid)
    expected = definition(q.double(), k.double(), v.double(), wide, config, grid)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * expected.norm()


def test_the_error_counts_real_tokens_alone() -> None:
    q, k, v, weights = operands(10)
    lengths = torch.tensor([10, 4])
    grid = TokenGrid(0, None, lengths)
    y_true = torch.zeros_like(q)
    y = attend_bidirectional(q, k, v, weights, settings("none"), grid)
    expected = torch.cat([y[0], y[1, :4]]).square().mean()
    assert torch.allclose(bidirectional_error(q, k, v, y_true, weights, settings("none"), grid), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("window", "grid", "message"),
    [
        ("terraced", TokenGrid(), "`window` of bidirectional attention must be one of tiled, none, got 'terraced'"),
        ("tiled", TokenGrid(1), "`window` tiled needs the `grid` of the patches, got None"),
        ("tiled", TokenGrid(1, (2, 4)), "`grid` must hold the 9 patches of a row, got 2 x 4"),
        ("tiled", TokenGrid(1, torch.ones(3, 2)), r"`grid` must be rows and columns, or \[B, 2\] = \[2, 2\]"),
        ("none", TokenGrid(11), "`prefix` must be from 0 to the 10 tokens, got 11"),
        ("none", TokenGrid(lengths=torch.ones(3)), r"`lengths` must be \[B\] = \[2\], got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(window: str, grid: TokenGrid, message: str) -> None:
    q, k, v, weights = operands(10)
    with pytest.raises(ValueError, match=message):
        attend_bidirectional(q, k, v, weights, settings(window), grid)


def test_causal_attention_has_no_tiles() -> None:
    q, k, v, weights = operands(10)
    with pytest.raises(ValueError, match="`window` of causal attention must be one of terraced, sliding, none"):
        attend(q, k, v, weights, settings("tiled"))

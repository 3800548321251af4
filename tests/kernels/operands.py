"""Operands and float64 results that the tests of the fused kernels compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention import hybrid_attention_naive

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("q", "k", "v", "w_q", "w_k", "gamma", "linear_factor", "b_q", "b_k")
# Relative to float64 on the rounded inputs, in norm: forward, gradients.
TOLERANCES = {torch.float32: (5e-6, 2e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (4e-3, 1e-2)}


@dataclass
class Case:
    """One call: tensors by name (absent ones None) and the options that are not tensors."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]

    def given(self) -> list[str]:
        return [name for name in NAMES if self.tensors[name] is not None]

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of `hybrid_attention`."""
        t = self.tensors
        first = tuple(x for name in NAMES[:6] if (x := t[name]) is not None)
        return first, {name: t[name] for name in NAMES[6:]} | self.options

    def wide(self) -> Case:
        """The same in float64, as leaves."""
        return Case(
            {n: None if x is None else x.detach().double().requires_grad_() for n, x in self.tensors.items()},
            self.options,
        )

    def leaves(self) -> Case:
        return Case(
            {n: None if x is None else x.detach().clone().requires_grad_() for n, x in self.tensors.items()},
            self.options,
        )

    def rows(self, row: int, start: int, stop: int) -> Case:
        """The same call on tokens `start` to `stop` of one row."""
        cut = {n: x[row : row + 1, start:stop] for n in NAMES[:3] if (x := self.tensors[n]) is not None}
        return Case(self.tensors | cut, self.options)


def make(
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 1,
    per: str = "query",
    dim: int = 32,
    columns: int = 16,
    window: str = "terraced",
    window_size: int = 16,
    feature_map: str = "hedgehog",
    affine: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random operands; maps rounded to `dtype`, as the kernels see them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    map_heads = heads if per == "query" else key_heads
    gamma = torch.rand(heads, generator=generator).to(DEVICE) * 0.5 + 0.05
    tensors: dict[str, Tensor | None] = {
        "q": draw(batch, tokens, heads, dim),
        "k": draw(batch, tokens, key_heads, dim),
        "v": draw(batch, tokens, key_heads, dim),
        "w_q": draw(heads, dim, columns) * 2 * dim**-0.5,
        "w_k": draw(map_heads, dim, columns) * 2 * dim**-0.5,
        "gamma": gamma,
        "linear_factor": 1 - gamma if affine else None,
        "b_q": draw(heads, columns).float() if bias else None,
        "b_k": draw(map_heads, columns).float() if bias else None,
    }
    options = {"window": window, "window_size": window_size, "feature_map": feature_map, "softcap": softcap}
    return Case(tensors, options)


def definition(case: Case) -> Tensor:
    """y [B, T, H, D] by the quadratic form."""
    tensors, options = case.arguments()
    return hybrid_attention_naive(*tensors, **options)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; NaN stays NaN."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))

"""Decoding for a long time does not drift: the recurrent form in float32 beside float64 over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention import HybridState, empty_state, hybrid_attention
from tests.kernels.test_hybrid_attention import make, rows

CHECKED = 1_000  # every so many tokens an output is compared
WHERE: dict[str, Any] = {"window": "terraced", "window_size": 64}


def inputs(tokens: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Two rows: random numbers, and others rounded to bf16."""
    tensors, options = make(tokens, heads=2, key_heads=1, dim=8, features=8, dtype=torch.float32)
    for x in tensors[:3]:
        x[1] = x[1].bfloat16().float()
    return tensors, options | WHERE


def decode(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, HybridState]:
    batch, tokens = tensors[0].shape[:2]
    state = empty_state(batch, 2, 16, 1, 8, 8, **WHERE, dtype=tensors[0].dtype, device="cpu")
    outputs = []
    for t in range(tokens):
        y, state = hybrid_attention(*rows(tensors, t, t + 1), **options, initial_state=state, return_state=True)
        if (t + 1) % CHECKED == 0:
            outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.slow
@torch.no_grad()
def test_100_000_decoded_tokens_stay_within_1e_3_of_a_float64_recurrence() -> None:
    tensors, options = inputs(100_000)
    y, state = decode(tensors, options)
    expected, reference = hybrid_attention(*(x.double() for x in tensors), **options, return_state=True)
    assert state.s.dtype == state.z.dtype == torch.float32
    for row in range(2):
        for actual, true in (
            (y[row], expected[row, CHECKED - 1 :: CHECKED]),
            (y[row, -1], expected[row, -1]),
            (state.s[row], reference.s[row]),
            (state.z[row], reference.z[row]),
        ):
            assert (actual.double() - true).norm() < 1e-3 * true.norm()


@torch.no_grad()
def test_bf16_tokens_leave_the_state_of_the_same_numbers_in_float32() -> None:
    """So what holds for the rounded row above holds for a bf16 model: its state is as exact, bit for bit."""
    tensors, options = inputs(2_000)
    rounded = (*(x[1:] for x in tensors[:3]), *tensors[3:])
    narrow = (*(x.bfloat16() for x in rounded[:3]), *tensors[3:])
    (y, state), (y_narrow, state_narrow) = decode(rounded, options), decode(narrow, options)
    assert y_narrow.dtype == torch.bfloat16
    assert torch.equal(y_narrow, y.bfloat16())
    assert torch.equal(state_narrow.s, state.s)
    assert torch.equal(state_narrow.z, state.z)

"""First tokens, features of unrotated q and k, and the mixture: quadratic = chunked = recurrent in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lolcats_kernels.hybrid_attention import (
    HybridConfig,
    HybridWeights,
    attend,
    attention_weights,
    decode_,
    empty_state,
)
from lolcats_kernels.hybrid_attention.mixture import ShareWeights, log_count, unrotate

SIZE, HEADS, KEY_HEADS, DIM, FEATURES = 8, 4, 2, 8, 3
Operands = tuple[tuple[Tensor, Tensor, Tensor], HybridWeights, HybridConfig]


def operands(
    tokens: int,
    *,
    batch: int = 1,
    window: str = "terraced",
    sinks: int = 0,
    mixture: bool = True,
    decay: bool = True,
    unrotated: bool = True,
    per_key_head: bool = True,
    interleaved: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Operands:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    map_heads = KEY_HEADS if per_key_head else HEADS
    share = ShareWeights(draw(HEADS), draw(HEADS, DIM), *(1 + 0.3 * draw(HEADS) for _ in range(3)))
    weights = HybridWeights(
        draw(HEADS, DIM, FEATURES),
        draw(map_heads, DIM, FEATURES),
        torch.sigmoid(draw(HEADS) - 1),
        decay=torch.sigmoid(draw(map_heads) + 3) if decay else None,
        share=share if mixture else None,
        frequencies=0.7 ** torch.arange(3, dtype=dtype) if unrotated else None,
    )
    config = HybridConfig(
        DIM**-0.5, window=window, window_size=SIZE, window_sinks=sinks, rotary_interleaved=interleaved
    )
    qkv = draw(batch, tokens, HEADS, DIM), draw(batch, tokens, KEY_HEADS, DIM), draw(batch, tokens, KEY_HEADS, DIM)
    return qkv, weights, config


def definition(given: Operands) -> Tensor:
    qkv, weights, config = given
    y = attend(*qkv, weights, config, backend="naive")
    assert isinstance(y, Tensor)
    return y


def rows(given: Operands, start: int, stop: int) -> tuple[Any, ...]:
    qkv, weights, config = given
    return (*(x[:, start:stop] for x in qkv), weights, config)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


VARIANTS = [
    {"window": window, "sinks": sinks, "mixture": mixture, "decay": decay, "unrotated": unrotated}
    for window in ("terraced", "sliding")
    for mixture in (False, True)
    for sinks in (0, 1, 4, SIZE)
    for decay in (False, True)
    for unrotated in (False, True)
    if not (mixture and window == "sliding")
]


def name(variant: dict[str, Any]) -> str:
    return "-".join(
        str(value if key in ("window", "sinks") else key if value else "") for key, value in variant.items()
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("per_key_head", [False, True])
def test_three_forms_agree(variant: dict[str, Any], per_key_head: bool) -> None:
    given = operands(67, **variant, per_key_head=per_key_head, interleaved=per_key_head)
    expected = definition(given)
    whole = attend(*rows(given, 0, 67))
    assert isinstance(whole, Tensor)
    close(whole, expected)
    y, state = attend(*rows(given, 0, 1), return_state=True)
    parts = [y]
    for t in range(1, 67):
        parts.append(decode_(*rows(given, t, t + 1), state))
    close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("window", ["terraced", "sliding"])
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=5), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_any_split_into_prefills_and_steps_is_the_full_pass(
    window: str, cuts: list[int], tokens: int, seed: int
) -> None:
    mixture = window == "terraced" and seed % 3 > 0
    given = operands(
        tokens, window=window, sinks=(0, 1, 3, 8)[seed % 4], mixture=mixture, decay=seed % 2 == 1, seed=seed
    )
    edges = sorted({0, tokens, *(c for c in cuts if c < tokens)})
    state, parts = None, []
    for start, stop in itertools.pairwise(edges):
        y, state = attend(*rows(given, start, stop), initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), definition(given))


def test_decoding_from_an_empty_state_is_the_full_pass() -> None:
    given = operands(40, sinks=3, batch=2)
    state = empty_state(
        2, KEY_HEADS, 2 * FEATURES, KEY_HEADS, DIM, DIM,
        window="terraced", window_size=SIZE, dtype=torch.float64, device=torch.device("cpu"), window_sinks=3,
    )  # fmt: skip
    close(torch.cat([decode_(*rows(given, t, t + 1), state) for t in range(40)], 1), definition(given))


@pytest.mark.parametrize("mixture", [False, True])
def test_sequences_of_one_batch_may_have_different_lengths_and_positions(mixture: bool) -> None:
    given = operands(50, batch=3, sinks=4, mixture=mixture)
    qkv, weights, config = given
    y, state = attend(*rows(given, 0, 40), lengths=torch.tensor([2, 21, 40]), return_state=True)
    more, after = attend(*rows(given, 40, 49), initial_state=state, lengths=torch.tensor([9, 3, 4]), return_state=True)
    step = decode_(*rows(given, 49, 50), after)
    for b, (n, m) in enumerate([(2, 9), (21, 3), (40, 4)]):
        joined = [torch.cat([x[b : b + 1, :n], x[b : b + 1, 40 : 40 + m], x[b : b + 1, 49:]], 1) for x in qkv]
        expected = definition(((joined[0], joined[1], joined[2]), weights, config))
        close(y[b : b + 1, :n], expected[:, :n])
        close(more[b : b + 1, :m], expected[:, n : n + m])
        close(step[b : b + 1], expected[:, -1:])


@pytest.mark.parametrize("mixture", [False, True])
def test_packed_documents_are_separate_documents_with_first_tokens_of_their_own(mixture: bool) -> None:
    given = operands(70, sinks=4, mixture=mixture)
    edges = [0, 1, 20, 27, 70]
    packed = attend(*rows(given, 0, 70), cu_seqlens=torch.tensor(edges))
    assert isinstance(packed, Tensor)
    for start, stop in itertools.pairwise(edges):
        qkv, weights, config = given
        alone = tuple(x[:, start:stop] for x in qkv)
        close(packed[:, start:stop], definition(((alone[0], alone[1], alone[2]), weights, config)))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("mixture", [False, True])
def test_gradients_equal_those_of_the_quadratic_form(mixture: bool, decay: bool) -> None:
    gradients = []
    for backend in ("chunked", "naive"):
        qkv, weights, config = operands(45, sinks=3, mixture=mixture, decay=decay)
        leaves = [x.requires_grad_() for x in (*qkv, *weights.tensors())]
        y = attend(*qkv, weights, config, backend=backend)
        assert isinstance(y, Tensor)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)).sum().backward()
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-9)


def test_weights_of_the_mixture_sum_to_one_and_lie_in_zero_to_one() -> None:
    qkv, weights, config = operands(50, sinks=4)
    found = attention_weights(qkv[0], qkv[1], weights, config)
    assert found.sum(-1).allclose(torch.ones((), dtype=torch.float64))
    assert (found >= 0).all()


def test_an_undecayed_mixture_with_neutral_weights_is_one_softmax_over_window_and_scaled_features() -> None:
    qkv, weights, config = operands(50, sinks=4, decay=False, unrotated=False)
    zero, one = torch.zeros(HEADS, dtype=torch.float64), torch.ones(HEADS, dtype=torch.float64)
    neutral = ShareWeights(zero, torch.zeros(HEADS, DIM, dtype=torch.float64), one, one, one)
    bare = HybridWeights(weights.w_q, weights.w_k, weights.window_factor, share=neutral)
    found = attention_weights(qkv[0], qkv[1], bare, config)
    # exp(score) inside and phi.phi outside, under one sum.
    plain = HybridWeights(weights.w_q, weights.w_k, one)
    inside = attention_weights(qkv[0], qkv[1], HybridWeights(weights.w_q, weights.w_k, one, 0 * one), config) > 0
    scores = (qkv[0].transpose(1, 2) @ qkv[1].transpose(1, 2).repeat_interleave(2, 1).mT) * config.scale
    # Without the subtracted maximum gamma = 1 is the same sum, so undo it by gamma = exp(max).
    top = scores.masked_fill(~inside, float("-inf")).amax(-1)
    for t in range(50):
        one_query = HybridWeights(plain.w_q, plain.w_k, top[0, :, t].exp())
        expected = attention_weights(qkv[0][:, t : t + 1], qkv[1][:, : t + 1], one_query, config, first_query=t)
        close(found[:, :, t : t + 1, : t + 1], expected)


def test_a_mixture_is_bounded_by_the_values_at_any_length() -> None:
    given = operands(3000, sinks=4, dtype=torch.float32, decay=False)
    y = attend(*rows(given, 0, 3000))
    assert isinstance(y, Tensor)
    assert y.abs().max() <= given[0][2].abs().max() * (1 + 1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_unrotate_is_the_inverse_of_the_rotary_embedding_of_the_rotated_part(interleaved: bool) -> None:
    x = torch.randn(2, 3, 11, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    positions = torch.arange(5, 16)
    turned = unrotate(x, positions, -frequencies, interleaved)
    assert not turned[..., :6].allclose(x[..., :6])
    assert turned[..., 6:].equal(x[..., 6:])
    close(unrotate(turned, positions, frequencies, interleaved), x)


@pytest.mark.parametrize("decay", [0.3, 0.99, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_log_count_is_the_log_of_the_decayed_sum(decay: float, tokens: int) -> None:
    d = torch.tensor(decay, dtype=torch.float64)
    expected = (d ** (5 + torch.arange(tokens, dtype=torch.float64))).sum().log()
    found = log_count(torch.tensor(float(tokens), dtype=torch.float64), 5, d.log())
    torch.testing.assert_close(found, expected, rtol=1e-4 if decay == 1 else 1e-9, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_sinks": SIZE + 1}, f"`window_sinks` must be from 0 to {SIZE} with window terraced of {SIZE}, got 9"),
        ({"window_sinks": -1}, "`window_sinks` must be from 0"),
        ({"window": "none", "window_sinks": 1}, "`window_sinks` must be from 0 to 0 with window none"),
    ],
)
def test_bad_sinks_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridConfig(**{"scale": 1.0, "window_size": SIZE} | change)


def test_a_mixture_with_another_window_is_refused() -> None:
    given = operands(20, window="sliding")
    with pytest.raises(ValueError, match=r"a mixture \(`share`\) needs `window` terraced, got 'sliding'"):
        attend(*rows(given, 0, 20))

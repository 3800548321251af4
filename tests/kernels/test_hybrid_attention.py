"""Every form of the hybrid attention is the same function: chunked = recurrent = quadratic in float64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lolcats_kernels.hybrid_attention import (
    attention_transfer_loss,
    empty_state,
    feature_count,
    hybrid_attention,
    hybrid_attention_naive,
    hybrid_weights,
)

WINDOWS = ("terraced", "sliding", "none")
MAPS = ("hedgehog", "t2r", "elu")


def make(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    map_heads: int | None = None,
    dim: int = 8,
    features: int = 6,
    bias: bool = False,
    affine: bool = False,
    decay: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Positional arguments and keyword arguments of `hybrid_attention`, drawn afresh from `seed`."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    map_heads = map_heads or heads
    gamma = torch.sigmoid(draw(heads) - 2)
    tensors = (
        1.5 * draw(batch, tokens, heads, dim),
        1.5 * draw(batch, tokens, key_heads, dim),
        draw(batch, tokens, key_heads, dim),
        draw(heads, dim, features) * dim**-0.5,
        draw(map_heads, dim, features) * dim**-0.5,
        gamma,
    )
    options: dict[str, Any] = {"linear_factor": 1 - gamma if affine else None}
    if decay:
        options["decay"] = torch.sigmoid(draw(map_heads) + 1)
    if bias:
        options |= {"b_q": draw(heads, features), "b_k": draw(map_heads, features)}
    return tensors, options


def rows(tensors: tuple[torch.Tensor, ...], start: int, stop: int) -> tuple[torch.Tensor, ...]:
    return tuple(x[:, start:stop] for x in tensors[:3]) + tensors[3:]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 25, 41, 64])
def test_chunked_equals_quadratic_at_odd_lengths(window: str, tokens: int) -> None:
    tensors, options = make(tokens, affine=True)
    options |= {"window": window, "window_size": 8}
    close(hybrid_attention(*tensors, **options), hybrid_attention_naive(*tensors, **options))


def every_combination() -> list[Any]:
    """All of window, map, GQA ratio and kind of key map; lengths spread over 1 … 520, none a multiple of its window."""
    combinations = list(itertools.product(WINDOWS, MAPS, (1, 2, 4, 8), (False, True)))
    lengths = [1 + 519 * i // (len(combinations) - 1) for i in range(len(combinations))]
    random.Random(0).shuffle(lengths)
    cases = []
    for i, (combination, tokens) in enumerate(zip(combinations, lengths, strict=True)):
        size = (4, 8, 16, 32, 64, 128)[i % 6]
        cases.append((*combination, size, tokens if tokens % size else tokens - 1))
    return cases


@pytest.mark.parametrize(
    ("window", "feature_map", "ratio", "per_key_head", "window_size", "tokens"), every_combination()
)
def test_three_forms_agree(
    window: str, feature_map: str, ratio: int, per_key_head: bool, window_size: int, tokens: int
) -> None:
    heads, key_heads = 8, 8 // ratio
    tensors, options = make(
        tokens,
        batch=1,
        heads=heads,
        key_heads=key_heads,
        map_heads=key_heads if per_key_head else heads,
        bias=tokens % 2 == 0,
        affine=tokens % 3 == 0,
        decay=tokens % 4 in (1, 2),
    )
    options |= {"window": window, "window_size": window_size, "feature_map": feature_map}
    expected = hybrid_attention(*tensors, **options, backend="naive")
    close(hybrid_attention(*tensors, **options, backend="chunked"), expected)
    y, state = hybrid_attention(*rows(tensors, 0, 1), **options, return_state=True)
    parts = [y]
    for t in range(1, tokens):
        y, state = hybrid_attention(*rows(tensors, t, t + 1), **options, initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), expected)
    assert state.length.tolist() == [tokens]


@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=5), tokens=st.integers(1, 60), seed=st.integers(0, 9))
def test_any_split_into_prefills_and_steps_is_the_full_pass(
    window: str, cuts: list[int], tokens: int, seed: int
) -> None:
    tensors, options = make(tokens, seed=seed, decay=seed % 2 == 1)
    options |= {"window": window, "window_size": 8}
    expected = hybrid_attention_naive(*tensors, **options)
    edges = sorted({0, tokens, *(c for c in cuts if c < tokens)})
    state, parts = None, []
    for start, stop in itertools.pairwise(edges):
        y, state = hybrid_attention(*rows(tensors, start, stop), **options, initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", [False, True])
def test_decoding_from_an_empty_state_is_the_full_pass(window: str, decay: bool) -> None:
    tensors, options = make(35, decay=decay)
    options |= {"window": window, "window_size": 8}
    state = empty_state(2, 4, 12, 2, 8, 8, window=window, window_size=8, dtype=torch.float64, device="cpu")
    parts = []
    for t in range(35):
        y, state = hybrid_attention(*rows(tensors, t, t + 1), **options, initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), hybrid_attention_naive(*tensors, **options))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", [False, True])
def test_sequences_of_one_batch_may_have_different_lengths_and_positions(window: str, decay: bool) -> None:
    tensors, options = make(40, batch=3, decay=decay)
    options |= {"window": window, "window_size": 8}
    lengths = torch.tensor([5, 21, 32])
    y, state = hybrid_attention(*rows(tensors, 0, 32), **options, lengths=lengths, return_state=True)
    more, after = hybrid_attention(
        *rows(tensors, 32, 37), **options, initial_state=state, lengths=torch.tensor([5, 3, 4]), return_state=True
    )
    for b, (n, m) in enumerate([(5, 5), (21, 3), (32, 4)]):
        joined = tuple(torch.cat([x[b : b + 1, :n], x[b : b + 1, 32 : 32 + m]], 1) for x in tensors[:3]) + tensors[3:]
        expected, alone = hybrid_attention(*joined, **options, return_state=True)
        close(y[b : b + 1, :n], expected[:, :n])
        close(more[b : b + 1, :m], expected[:, n:])
        assert after.length[b] == n + m
        close(after.s[b : b + 1], alone.s)
    step, _ = hybrid_attention(*rows(tensors, 39, 40), **options, initial_state=after, return_state=True)
    joined = tuple(torch.cat([x[1:2, :21], x[1:2, 32:35], x[1:2, 39:]], 1) for x in tensors[:3]) + tensors[3:]
    close(step[1:2], hybrid_attention_naive(*joined, **options)[:, -1:])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", [False, True])
def test_packed_documents_are_separate_documents(window: str, decay: bool) -> None:
    tensors, options = make(60, batch=1, decay=decay)
    options |= {"window": window, "window_size": 8}
    edges = [0, 1, 20, 27, 60]
    packed, state = hybrid_attention(*tensors, **options, cu_seqlens=torch.tensor(edges), return_state=True)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        alone, alone_state = hybrid_attention(*rows(tensors, start, stop), **options, return_state=True)
        close(packed[:, start:stop], alone)
        close(state.s[i : i + 1], alone_state.s, 1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", [False, True])
def test_outputs_do_not_depend_on_later_tokens_or_their_number(window: str, decay: bool) -> None:
    tensors, options = make(50, decay=decay)
    options |= {"window": window, "window_size": 8}
    whole = hybrid_attention(*tensors, **options)
    for stop in (1, 3, 8, 9, 17, 33, 49):
        close(hybrid_attention(*rows(tensors, 0, stop), **options), whole[:, :stop])


@pytest.mark.parametrize(("window", "covered"), [("terraced", 16), ("sliding", 8)])
def test_inside_the_window_the_student_is_softmax_whatever_its_maps(window: str, covered: int) -> None:
    tensors, options = make(covered)
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(hybrid_attention(*tensors, **options, window=window, window_size=8), softmax.transpose(1, 2))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradients_equal_those_of_the_quadratic_form(window: str, feature_map: str) -> None:
    tensors, options = make(29, heads=4, key_heads=2, bias=True, decay=feature_map in MAPS[::2])
    options |= {"window": window, "window_size": 8, "feature_map": feature_map}
    target = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for backend in ("chunked", "naive"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if "decay" in options:
            options["decay"] = options["decay"].detach().clone().requires_grad_()
            leaves.append(options["decay"])
        y = hybrid_attention(*leaves[:6], **options, backend=backend)
        (y * target).sum().backward()
        gradients.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-10)


def test_transfer_gradients_pass_gradcheck() -> None:
    tensors, options = make(20, batch=1, heads=2, key_heads=1, dim=4, features=3, affine=True)
    q, k, v, w_q, w_k, gamma = tensors
    y_true = torch.randn(q.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    maps = [x.clone().requires_grad_() for x in (w_q, w_k, gamma)]
    assert torch.autograd.gradcheck(
        lambda a, b, c: attention_transfer_loss(q, k, v, y_true, a, b, c, **options, window_size=4), maps
    )


@pytest.mark.parametrize("tokens", [1, 5, 8, 16])
def test_maps_get_no_gradient_while_nothing_is_outside_the_window(tokens: int) -> None:
    tensors, options = make(tokens)
    w_q = tensors[3].clone().requires_grad_()
    hybrid_attention(*tensors[:3], w_q, *tensors[4:], **options, window_size=8).sum().backward()
    assert w_q.grad is not None
    assert not w_q.grad.any()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_decay_of_one_is_none_and_of_zero_leaves_the_window_alone(window: str) -> None:
    tensors, options = make(41)
    options |= {"window": window, "window_size": 8}
    ones = torch.ones(4, dtype=torch.float64)
    close(hybrid_attention(*tensors, **options, decay=ones), hybrid_attention(*tensors, **options))
    if window != "none":
        alone = hybrid_attention(*tensors, **options | {"linear_factor": 0 * ones})
        close(hybrid_attention(*tensors, **options, decay=1e-9 * ones), alone, 1e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
def test_reduced_precision_stays_within_its_bound_of_float64(window: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors, options = make(333, dtype=dtype, dim=32, features=16)
    y = hybrid_attention(*tensors, **options, window=window, window_size=64)
    assert y.dtype == dtype
    close(y.double(), hybrid_attention_naive(*(x.double() for x in tensors), window=window, window_size=64), tolerance)


def test_state_is_float32_for_bf16_inputs_and_does_not_stagnate() -> None:
    tensors, options = make(400, batch=1, dtype=torch.bfloat16)
    _, state = hybrid_attention(*tensors, **options, window_size=8, return_state=True)
    assert state.s.dtype == state.z.dtype == torch.float32
    folded = 400 - 16
    # Hedgehog features of one token sum to 2, so z counts the folded tokens.
    assert state.z.sum(-1).allclose(torch.full((1, 4), 2.0 * folded), rtol=1e-4)


def test_weights_sum_to_one_and_by_block_equal_the_whole() -> None:
    tensors, options = make(30)
    q, k, _, *maps = tensors
    whole = hybrid_weights(q, k, *maps, **options, window_size=8)
    assert whole.sum(-1).allclose(torch.ones((), dtype=torch.float64))
    block = hybrid_weights(q[:, 10:20], k, *maps, **options, window_size=8, first_query=10)
    close(block, whole[:, :, 10:20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": "square"}, "`window` must be one of"),
        ({"feature_map": "relu"}, "`feature_map` must be one of"),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"window_factor": torch.ones(3)}, r"`window_factor` must be \[H\] = \[4\], got \(3,\)"),
        ({"w_k": torch.ones(3, 8, 6)}, "w_q must be"),
        ({"k": torch.ones(2, 5, 2, 8)}, "q must be"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "B = 1"),
        ({"lengths": torch.tensor([9])}, "`lengths` must be"),
        ({"decay": torch.ones(2)}, r"`decay` must be \[4\], one for each map of w_k, got \(2,\)"),
        ({"backend": "naive", "return_state": True}, "whole sequences only"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    tensors, options = make(9)
    named = dict(zip(("q", "k", "v", "w_q", "w_k", "window_factor"), tensors, strict=True)) | options | change
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**named)


@pytest.mark.parametrize("feature_map", MAPS)
def test_feature_count_is_the_map_s_width(feature_map: str) -> None:
    tensors, options = make(20, features=5)
    _, state = hybrid_attention(*tensors, **options, feature_map=feature_map, window_size=4, return_state=True)
    assert state.z.shape[-1] == feature_count(feature_map, 5)

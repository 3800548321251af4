"""The fused kernels against float64: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention import (
    attention_transfer_loss,
    empty_state,
    feature_count,
    hybrid_attention,
    hybrid_decode_,
)
from tests.kernels.operands import DEVICE, NAMES, TOLERANCES, Case, definition, make, relative

# Each row changes several things at once; together they hold every window, map, ratio of heads and odd length.
CASES: list[dict[str, Any]] = [
    {"tokens": 70},
    {"tokens": 70, "window": "sliding"},
    {"tokens": 70, "window": "none"},
    {"tokens": 1, "heads": 4, "key_heads": 1},
    {"tokens": 15, "window": "sliding", "feature_map": "t2r"},
    {"tokens": 16, "window": "none", "feature_map": "elu"},
    {"tokens": 17, "per": "kv", "heads": 4, "key_heads": 2, "feature_map": "t2r", "bias": True},
    {"tokens": 33, "batch": 2, "dim": 32},
    {"tokens": 50, "per": "kv", "heads": 8, "key_heads": 1, "bias": True, "affine": True, "softcap": 2.0},
    {"tokens": 50, "per": "kv", "heads": 4, "key_heads": 2, "window": "sliding", "softcap": 2.0, "affine": True},
    {"tokens": 49, "per": "kv", "heads": 4, "key_heads": 2, "window": "none", "bias": True, "affine": True},
    {"tokens": 64, "feature_map": "elu", "columns": 24},
    {"tokens": 65, "feature_map": "t2r", "bias": True, "heads": 2, "key_heads": 2},
    {"tokens": 50, "dim": 96, "columns": 24, "batch": 2},
    {"tokens": 130, "window_size": 64, "columns": 48, "dim": 32},
    {"tokens": 100, "window": "sliding", "window_size": 32, "feature_map": "elu", "bias": True},
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is not written first holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


def run(case: Case, **more: Any) -> Any:
    tensors, options = case.arguments()
    return hybrid_attention(*tensors, **options, backend="triton", **more)


def compare_gradients(case: Case, found: Case, expected: Case, tolerance: float) -> None:
    for name in case.given():
        true = expected.tensors[name].grad  # type: ignore[union-attr]
        got = found.tensors[name].grad  # type: ignore[union-attr]
        if true is None or float(true.norm()) < 1e-8:
            assert got is None or float(got.abs().max()) < 1e-4, name
        else:
            # A sum over heads that nearly cancels has no relative accuracy to speak of.
            slack = 10 if name in ("gamma", "linear_factor") else 1
            assert relative(got, true) <= slack * tolerance, name


@pytest.mark.parametrize("options", CASES, ids=name_of)
def test_outputs_and_all_gradients_equal_the_definition(options: dict[str, Any]) -> None:
    case = make(**options)
    found, expected = case.leaves(), case.wide()
    y, y_true = run(found), definition(expected)
    forward, backward = TOLERANCES[torch.float32]
    assert relative(y, y_true) <= forward
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y_true.backward(upstream.double())
    compare_gradients(case, found, expected, backward)


@pytest.mark.parametrize("options", [row for row in CASES if row.get("window", "terraced") == "terraced"], ids=name_of)
def test_transfer_loss_and_gradients_equal_the_definition(options: dict[str, Any]) -> None:
    case = make(**options)
    found, expected = case.leaves(), case.wide()
    for name in ("q", "k", "v"):
        found.tensors[name].requires_grad_(False)  # type: ignore[union-attr]
    target = torch.randn_like(case.tensors["q"])  # type: ignore[arg-type]
    tensors, keywords = found.arguments()
    loss = attention_transfer_loss(*tensors[:3], target, *tensors[3:], **keywords, backend="triton")
    true = (definition(expected) - target.double()).square().mean()
    assert float(loss.detach()) == pytest.approx(float(true.detach()), rel=1e-5)
    (3 * loss).backward()
    (3 * true).backward()
    maps = Case({n: x if n in NAMES[3:] else None for n, x in case.tensors.items()}, case.options)
    compare_gradients(maps, found, expected, TOLERANCES[torch.float32][1])
    if case.tensors["q"].shape[1] <= 2 * case.options["window_size"]:  # type: ignore[union-attr]
        # Nothing is outside the window, so nothing depends on the maps.
        assert not found.tensors["w_q"].grad.any()  # type: ignore[union-attr]
        assert not found.tensors["w_k"].grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("window", ["terraced", "sliding", "none"])
def test_split_sequences_equal_whole_ones(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One program per head would do; more segments than sequences take the second pass over their sums.
    from lolcats_kernels.hybrid_attention.fused import launch

    monkeypatch.setattr(launch, "FILL", 40)
    case = make(200, window=window, heads=2, key_heads=2)
    found, expected = case.leaves(), case.wide()
    y, y_true = run(found), definition(expected)
    assert relative(y, y_true) <= TOLERANCES[torch.float32][0]
    y.sum().backward()
    y_true.sum().backward()
    compare_gradients(case, found, expected, TOLERANCES[torch.float32][1])


@pytest.mark.parametrize("window", ["terraced", "sliding", "none"])
def test_packed_sequences_equal_separate_ones(window: str) -> None:
    lengths = [1, 40, 16, 33]
    case = make(sum(lengths), window=window)
    edges = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    found = case.leaves()
    y = run(found, cu_seqlens=edges.to(torch.int32))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    starts = edges.tolist()
    for start, stop in itertools.pairwise(starts):
        alone = case.rows(0, start, stop).leaves()
        y_alone = run(alone)
        y_alone.backward(upstream[:, start:stop])
        torch.testing.assert_close(y[:, start:stop], y_alone, rtol=0, atol=2e-6)
        for name in ("q", "k", "v"):
            whole = found.tensors[name].grad[:, start:stop]  # type: ignore[union-attr, index]
            torch.testing.assert_close(whole, alone.tensors[name].grad, rtol=1e-4, atol=2e-6)  # type: ignore[union-attr]
    # Packed transfer loss: the mean over all tokens.
    tensors, keywords = case.arguments()
    target = torch.randn_like(tensors[0])
    loss = attention_transfer_loss(
        *tensors[:3], target, *tensors[3:], **keywords, backend="triton", cu_seqlens=edges.to(torch.int32)
    )
    assert float(loss) == pytest.approx(float((y.detach() - target).square().mean()), rel=1e-5)


def test_right_padding_changes_nothing() -> None:
    lengths = torch.tensor([50, 17, 33], device=DEVICE)
    case = make(50, batch=3)
    found = case.leaves()
    y = run(found, lengths=lengths)
    real = torch.arange(50, device=DEVICE)[None, :] < lengths[:, None]
    y[real].sum().backward()
    for row, length in enumerate(lengths.tolist()):
        alone = case.rows(row, 0, length).leaves()
        y_alone = run(alone)
        y_alone.sum().backward()
        torch.testing.assert_close(y[row, :length], y_alone[0], rtol=0, atol=2e-6)
        for name in ("q", "k", "v"):
            grad = found.tensors[name].grad[row]  # type: ignore[union-attr, index]
            torch.testing.assert_close(grad[:length], alone.tensors[name].grad[0], rtol=1e-4, atol=2e-6)  # type: ignore[union-attr, index]
            assert not grad[length:].any()


def test_outputs_do_not_depend_on_later_tokens_and_repeat_bitwise() -> None:
    case = make(100)
    y = run(case)
    assert torch.equal(y, run(case))
    assert torch.equal(y[:, :70], run(case.rows(0, 0, 70)))


def state_for(case: Case, batch: int) -> Any:
    q, k, w_q, w_k = (case.tensors[name] for name in ("q", "k", "w_q", "w_k"))
    assert q is not None and k is not None and w_q is not None and w_k is not None  # noqa: PT018
    window = {name: case.options[name] for name in ("window", "window_size")}
    features = feature_count(case.options["feature_map"], w_q.shape[-1])
    shape = (batch, w_k.shape[0], features, k.shape[2], k.shape[3], k.shape[3])
    return empty_state(*shape, **window, dtype=k.dtype, device=DEVICE)


def decode(case: Case, state: Any, row: slice, token: slice) -> Tensor:
    tensors, options = case.arguments()
    q, k, v = (x[row, token] for x in tensors[:3])
    return hybrid_decode_(q, k, v, *tensors[3:], state, **options, backend="triton")


DECODED = [
    {"tokens": 70},
    {"tokens": 70, "per": "kv", "heads": 4, "key_heads": 2, "bias": True, "affine": True, "softcap": 3.0},
    {"tokens": 50, "window": "sliding", "heads": 4, "key_heads": 2},
    {"tokens": 50, "window": "none", "per": "kv", "heads": 4, "key_heads": 2, "feature_map": "elu", "dim": 96},
]


@pytest.mark.parametrize("options", DECODED, ids=name_of)
def test_decoding_from_the_first_token_equals_the_definition(options: dict[str, Any]) -> None:
    case = make(**options, batch=2)
    state = state_for(case, 2)
    steps = [decode(case, state, slice(None), slice(t, t + 1)) for t in range(options["tokens"])]
    assert relative(torch.cat(steps, 1), definition(case.wide())) <= TOLERANCES[torch.float32][0]
    assert state.length.tolist() == [options["tokens"]] * 2


@pytest.mark.parametrize("window", ["terraced", "sliding", "none"])
@pytest.mark.parametrize("prompt", [1, 31, 32, 45])
def test_prefill_in_parts_then_decoding_equals_the_definition(window: str, prompt: int) -> None:
    case = make(80, window=window)
    y, state = run(case.rows(0, 0, prompt), return_state=True)
    more, state = run(case.rows(0, prompt, 60), initial_state=state, return_state=True)
    steps = [decode(case, state, slice(None), slice(t, t + 1)) for t in range(60, 80)]
    assert relative(torch.cat([y, more, *steps], 1), definition(case.wide())) <= TOLERANCES[torch.float32][0]


def test_sequences_of_a_batch_decode_at_their_own_positions() -> None:
    case = make(60, batch=3)
    true = definition(case.wide())
    lengths = torch.tensor([40, 3, 31], device=DEVICE)
    tensors, options = case.arguments()
    _, state = run(case, lengths=lengths, return_state=True)
    for _ in range(15):
        index = state.length[:, None, None, None].clone()
        q, k, v = (x.gather(1, index.expand(-1, 1, *x.shape[2:])) for x in tensors[:3])
        expected = true.gather(1, index.expand(-1, 1, *true.shape[2:]))
        y = hybrid_decode_(q, k, v, *tensors[3:], state, **options, backend="triton")
        assert relative(y, expected) <= 1e-5


def test_gradients_pass_the_tokens_but_not_the_state() -> None:
    case = make(60)
    _, state = run(case.rows(0, 0, 32), return_state=True)
    found, expected = case.rows(0, 32, 60).leaves(), case.wide()
    y, y_true = run(found, initial_state=state), definition(expected)[:, 32:]
    assert relative(y, y_true) <= TOLERANCES[torch.float32][0]
    y.sum().backward()
    y_true.sum().backward()
    grad = expected.tensors["q"].grad[:, 32:]  # type: ignore[union-attr, index]
    assert relative(found.tensors["q"].grad, grad) <= TOLERANCES[torch.float32][1]  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({"tokens": 8, "dim": 48}, "head dim must be one of"),
        ({"tokens": 8, "columns": 8}, "feature dim must be from 16 to 128, got 8"),
        ({"tokens": 8, "window_size": 24}, "window size must be 16, 32, 64 or 128, got 24"),
        ({"tokens": 8, "dtype": torch.float64}, "dtype must be float16, bfloat16 or float32"),
    ],
)
def test_unsupported_shapes_are_named(options: dict[str, Any], constraint: str) -> None:
    with pytest.raises(ValueError, match=constraint):
        run(make(**options))


def test_gradients_without_a_window_are_not_taken_in_half_precision() -> None:
    case = make(100, window="none", dtype=torch.float16)
    expected = definition(case.wide())
    with pytest.raises(ValueError, match=r"without a window gradients need float32, got torch\.float16"):
        run(case.leaves())
    with torch.no_grad():
        assert relative(run(case.leaves()), expected) <= TOLERANCES[torch.float16][0]


def test_a_decay_is_refused_and_left_to_the_chunked_form() -> None:
    tensors, options = make(40).arguments()
    options["decay"] = torch.full((2,), 0.9, device=DEVICE)
    with pytest.raises(ValueError, match="a decay of the linear weights is computed by the chunked form alone"):
        hybrid_attention(*tensors, **options, backend="triton")
    expected = hybrid_attention(*tensors, **options, backend="naive")
    assert relative(hybrid_attention(*tensors, **options), expected) <= TOLERANCES[torch.float32][0]


def test_a_state_that_needs_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="gradients do not pass through a state"):
        run(make(20).leaves(), return_state=True)

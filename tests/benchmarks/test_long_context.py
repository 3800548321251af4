"""The benchmark of long sequences checks before it measures, and its rows say what the method promises."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import long_context
from benchmarks.long_context import Shape, check, measure, with_ratios

SHAPE = Shape(hidden=32, layers=2, vocab=31, window_size=8, feature_dim=8, device="cpu")


def test_decoding_is_compared_with_the_full_pass_and_a_wrong_result_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check(SHAPE) < 1e-5
    assert check(dataclasses.replace(SHAPE, k_map_per="kv_head")) < 1e-5
    monkeypatch.setattr(long_context, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="nothing was measured"):
        check(SHAPE)


def test_the_cache_does_not_grow_with_decoded_or_prefilled_tokens() -> None:
    rows = [measure(kind, tokens, SHAPE) for kind in ("decode", "prefill") for tokens in (40, 160)]
    assert [(row["kind"], row["tokens"]) for row in rows] == [
        ("decode", 40),
        ("decode", 160),
        ("prefill", 40),
        ("prefill", 160),
    ]
    assert len({row["cache_mib"] for row in rows}) == 1
    # Decoding holds the same bytes at most, however long it goes on; prefill's grow with the tokens.
    decode, more, prefill, longer = (row["peak_mib"] for row in rows)
    assert decode == more > 0
    assert longer > 2 * prefill


def test_ratios_are_to_the_row_before_of_the_same_kind() -> None:
    def row(kind: str, tokens: int, seconds: float, peak: float) -> dict[str, Any]:
        return {"kind": kind, "tokens": tokens, "seconds": seconds, "peak_mib": peak}

    rows = with_ratios([row("prefill", 10, 1, 0), row("prefill", 40, 5, 8), row("decode", 10, 1, 2)])
    ratios = [[r[f"{key}_ratio"] for key in ("tokens", "seconds", "peak_mib")] for r in rows]
    assert ratios == [[None] * 3, [4, 5, None], [None] * 3]

"""Loss by position on models whose loss at each position is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lolcats_core.evaluation.position import buckets, joined_rows, loss_by_position, position_losses
from tests.core.tiny import FakeRows


def test_ranges_double_and_end_with_the_row() -> None:
    assert buckets(200) == [(0, 64), (64, 128), (128, 200)]
    assert buckets(64) == [(0, 64)]


def test_rows_are_joined_in_their_order_and_packed_documents_are_not() -> None:
    rows = FakeRows(rows=7, length=40)
    batch = joined_rows(rows, 130, 9)
    assert torch.equal(batch["input_ids"], rows.input_ids[:6].reshape(2, 120))
    packed = joined_rows(FakeRows(rows=7, length=40, documents=True), 130, 2)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (2, 40)


def test_a_constant_model_loses_the_same_everywhere(constant: Any) -> None:
    ids = torch.full((2, 200), constant.token)
    ids[:, 100:] = 7
    found = loss_by_position(position_losses(constant, {"input_ids": ids}))
    right, wrong = math.log(1 + 256 * math.exp(-20)), 20 + math.log(1 + 256 * math.exp(-20))
    assert [(entry["start"], entry["stop"], entry["tokens"]) for entry in found] == [
        (0, 64, 126),
        (64, 128, 128),
        (128, 200, 144),
    ]
    assert found[0]["loss"] == pytest.approx(right, abs=1e-6)
    assert found[1]["loss"] == pytest.approx((36 * right + 28 * wrong) / 64, rel=1e-5)
    assert found[2]["loss"] == pytest.approx(wrong, rel=1e-5)
    assert found[2]["stderr"] == pytest.approx(0, abs=1e-6)


def test_a_copier_knows_the_second_half_and_a_window_does_not(copier: Any, window_only: Any) -> None:
    half = torch.randint(1, 257, (1, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": torch.cat([half, half], 1)}
    for model, known in ((copier, True), (window_only, False)):
        losses = [entry["loss"] for entry in loss_by_position(position_losses(model, batch))]
        assert losses[0] > 5
        assert (losses[2] < 1) == known


def test_masked_targets_do_not_count(constant: Any) -> None:
    ids = torch.full((1, 100), constant.token)
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[0, 30:64] = False
    (first, second) = loss_by_position(position_losses(constant, {"input_ids": ids, "loss_mask": mask}))
    assert (first["tokens"], second["tokens"]) == (29, 36)

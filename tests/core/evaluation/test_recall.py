"""Copying recall on models built to have a known answer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_core.evaluation.recall import SKIPPED, copy_recall, mean_and_stderr, random_strings

VOCAB = 97


class LookBack(nn.Module):
    """Predicts the token after the latest earlier occurrence of the present `context` tokens within `reach`."""

    def __init__(self, reach: int, context: int = 3) -> None:
        super().__init__()
        self.reach, self.context = reach, context

    def predict(self, row: list[int], at: int) -> int:
        pattern = row[at + 1 - self.context : at + 1]
        for end in range(at - 1, max(self.context - 2, at - self.reach), -1):
            if row[end + 1 - self.context : end + 1] == pattern:
                return row[end + 1]
        return 0

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        predicted = [[self.predict(row, at) for at in range(len(row))] for row in input_ids.tolist()]
        return SimpleNamespace(logits=F.one_hot(torch.tensor(predicted), VOCAB).float())


class Constant(nn.Module):
    """Always predicts one token."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=F.one_hot(torch.full_like(input_ids, self.token), VOCAB).float())


def test_a_perfect_copier_recalls_everything() -> None:
    results = copy_recall(LookBack(reach=10**6), VOCAB, (16, 64), samples=5, seed=0, batch_size=2)
    assert {gap: (r.value, r.stderr, r.samples) for gap, r in results.items()} == {16: (1, 0, 5), 64: (1, 0, 5)}


def test_a_window_only_model_recalls_inside_its_window_and_nothing_beyond() -> None:
    results = copy_recall(LookBack(reach=48), VOCAB, (16, 32, 64), samples=4, seed=0, batch_size=4)
    assert [results[gap].value for gap in (16, 32)] == [1, 1]
    assert results[64].value < 0.05


def test_a_constant_model_recalls_at_chance_and_an_excluded_token_never() -> None:
    chance = copy_recall(Constant(7), VOCAB, (128,), samples=40, seed=0, batch_size=8)[128]
    assert chance.value == pytest.approx(1 / VOCAB, abs=4 * chance.stderr)
    assert chance.stderr > 0
    assert copy_recall(Constant(7), VOCAB, (128,), 8, 0, 8, exclude_ids=(7,))[128].value == 0


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    results = [copy_recall(Constant(3), VOCAB, (32, 40), 11, 5, batch_size) for batch_size in (1, 4, 11)]
    assert results[0] == results[1] == results[2]


def test_strings_depend_on_seed_gap_and_row_alone() -> None:
    few, many = random_strings(VOCAB, 20, 3, seed=1), random_strings(VOCAB, 20, 8, seed=1)
    assert np.array_equal(few, many[:3])
    assert not np.array_equal(few, random_strings(VOCAB, 20, 3, seed=2))
    assert not np.isin(random_strings(VOCAB, 500, 4, 0, exclude_ids=range(90)), range(90)).any()


def test_a_prefix_is_shown_first_and_not_scored() -> None:
    shown: list[Tensor] = []

    class Recorder(LookBack):
        def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
            shown.append(input_ids)
            return super().forward(input_ids)

    result = copy_recall(Recorder(10**6), VOCAB, (16,), 2, 0, 2, exclude_ids=(1,), prefix_ids=(1,))[16]
    assert shown[0].shape == (2, 33)
    assert shown[0][:, 0].tolist() == [1, 1]
    assert result.value == 1


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UserError, match=f"greater than {SKIPPED}, got 4"):
        copy_recall(Constant(0), VOCAB, (4,), 1, 0, 1)
    with pytest.raises(UserError, match="at least 2 ordinary tokens"):
        copy_recall(Constant(0), VOCAB, (8,), 1, 0, 1, exclude_ids=range(VOCAB))
    with pytest.raises(UserError, match="`recall_samples` must be at least 1"):
        copy_recall(Constant(0), VOCAB, (8,), 0, 0, 1)


def test_standard_error_is_that_of_the_mean() -> None:
    assert mean_and_stderr([0.0, 1.0, 0.0, 1.0]) == (0.5, pytest.approx(0.5 / np.sqrt(3)))
    assert mean_and_stderr([0.25]) == (0.25, 0.0)

"""Paired comparison against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lolcats_core.evaluation.paired import loss_comparison, mcnemar, paired_comparison, recovery


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (3, 3, 1.0), (1, 7, 2 * (1 + 8) / 256), (1000, 1000, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_tail(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p_value)


def test_differences_are_taken_item_by_item() -> None:
    result = paired_comparison([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert (result["difference"], result["only_teacher"], result["only_student"]) == (-0.5, 2, 0)
    assert result["p_value"] == 0.5
    assert result["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_scores_that_are_not_right_or_wrong_have_no_p_value() -> None:
    assert "p_value" not in paired_comparison([0.25, 0.5], [0.5, 0.5])


@pytest.mark.parametrize(("teacher", "student"), [([1.0], [1.0, 0.0]), ([], [])])
def test_different_items_are_refused(teacher: list[float], student: list[float]) -> None:
    with pytest.raises(ValueError, match="the same items of both"):
        paired_comparison(teacher, student)


def test_recovery_is_what_is_left_of_the_teacher_above_chance() -> None:
    teacher, student = [1.0] * 75 + [0.0] * 25, [1.0] * 50 + [0.0] * 50
    found = recovery(teacher, student, chance=0.25)
    assert found["value"] == pytest.approx(2 / 3)
    assert found["chance_corrected"] == pytest.approx(0.5)
    for key, interval in (("value", "interval"), ("chance_corrected", "chance_corrected_interval")):
        low, high = found[interval]
        assert low < found[key] < high
    same = recovery(teacher, teacher, chance=0.25)
    assert (same["value"], same["chance_corrected"], same["chance_corrected_interval"]) == (1.0, 1.0, [1.0, 1.0])
    assert "chance" not in recovery(teacher, student, chance=None)


def test_a_teacher_that_guesses_has_nothing_to_recover() -> None:
    guess, student = [1.0, 0.0, 0.0, 0.0] * 25, [0.0, 1.0, 0.0, 0.0] * 25
    found = recovery(guess, student, chance=0.25)
    assert (found["value"], found["chance_corrected"]) == (1.0, None)
    nothing = recovery([0.0] * 10, [1.0] * 10, chance=0.0)
    assert (nothing["value"], nothing["chance_corrected"]) == (None, None)


def test_the_bootstrap_interval_covers_the_normal_one_and_shrinks_with_pairing() -> None:
    rng = np.random.default_rng(1)
    teacher = (rng.random(400) < 0.7).astype(float)
    student = np.where(rng.random(400) < 0.9, teacher, 1 - teacher)
    paired = paired_comparison(teacher.tolist(), student.tolist())
    low, high = paired["interval"]
    assert high - low == pytest.approx(2 * 1.96 * paired["stderr"], rel=0.1)
    assert low < paired["difference"] < high
    shuffled = paired_comparison(teacher.tolist(), rng.permutation(student).tolist())
    assert shuffled["interval"][1] - shuffled["interval"][0] > 1.5 * (high - low)


def test_perplexities_are_compared_by_document() -> None:
    teacher = [{"loss": 20.0 * n, "weight": 10.0 * n} for n in range(1, 9)]
    student = [{"loss": 21.0 * n, "weight": 10.0 * n} for n in range(1, 9)]
    found = loss_comparison(teacher, student)
    assert found["difference"] == pytest.approx(0.1)
    assert found["value"] == pytest.approx(math.exp(-0.1))
    assert found["interval"] == pytest.approx([math.exp(-0.1)] * 2)
    assert loss_comparison(teacher, teacher)["value"] == 1.0

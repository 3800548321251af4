"""Comparing two models on the same items, so that a small difference can be told from noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lolcats_core.evaluation.recall import mean_and_stderr

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
# Resampled items at a time: 14 000 items of MMLU, 2000 times, would otherwise be gigabytes.
BLOCK = 2**22


def paired_comparison(teacher: Sequence[float], student: Sequence[float]) -> dict[str, Any]:
    """Student minus teacher, item by item.

    Args:
        teacher: a score per item; for accuracies 1.0 (right) or 0.0 (wrong).
        student: scores of the same items in the same order.

    Returns:
        ``difference`` (mean of student - teacher), its ``stderr`` and its 95 % bootstrap ``interval``; for accuracies
        also the items that ``only_teacher`` and ``only_student`` got right and McNemar's exact two-sided ``p_value``.

    Raises:
        ValueError: the lengths differ, or there are no items.
    """
    _require_same(teacher, student)
    difference, stderr = mean_and_stderr([after - before for before, after in zip(teacher, student, strict=True)])
    means = _resampled_means(np.array([teacher, student], dtype=np.float64))
    comparison: dict[str, Any] = {
        "difference": difference,
        "stderr": stderr,
        "interval": _interval(means[:, 1] - means[:, 0]),
        "items": len(teacher),
    }
    if {*teacher, *student} <= {0.0, 1.0}:
        only_teacher = sum(before > after for before, after in zip(teacher, student, strict=True))
        only_student = sum(after > before for before, after in zip(teacher, student, strict=True))
        comparison |= {
            "only_teacher": only_teacher,
            "only_student": only_student,
            "p_value": mcnemar(only_teacher, only_student),
        }
    return comparison


def recovery(teacher: Sequence[float], student: Sequence[float], chance: float | None) -> dict[str, Any]:
    """The share of the teacher's score that the student keeps, with 95 % bootstrap intervals over the items.

    Args:
        chance: what guessing reaches. None, or a teacher within two standard errors of it: nothing to correct for.

    Returns:
        ``value`` (student / teacher) and ``interval``; with a `chance` also ``chance_corrected``
        ((student - chance) / (teacher - chance)) and ``chance_corrected_interval``. What would divide by zero is None.
    """
    _require_same(teacher, student)
    scores = np.array([teacher, student], dtype=np.float64)
    before, after = scores.mean(1)
    means = _resampled_means(scores)
    result: dict[str, Any] = {"value": None, "interval": None}
    if before > 0:
        # With few items some resamples have a teacher that knows nothing, and no quotient.
        spread = means[:, 1] / means[:, 0] if means[:, 0].min() > 0 else None
        result = {"value": after / before, "interval": None if spread is None else _interval(spread)}
    if chance is None:
        return result
    result |= {"chance": chance, "chance_corrected": None, "chance_corrected_interval": None}
    above = before - chance
    if above > 2 * mean_and_stderr(teacher)[1] and above > 0:
        lifted = np.maximum(means[:, 0] - chance, 1e-9)
        result["chance_corrected"] = (after - chance) / above
        result["chance_corrected_interval"] = _interval((means[:, 1] - chance) / lifted)
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in result.items()}


def loss_comparison(teacher: Sequence[Mapping[str, float]], student: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """For perplexities: teacher's over student's (1 = nothing lost), by the documents that both were given.

    Args:
        teacher, student: per document its ``loss`` in nats and its ``weight`` in words, bytes or tokens.

    Returns:
        ``value`` (exp of the difference of the mean losses), its ``interval``, and ``difference`` in nats per unit of
        weight with ``difference_interval``.
    """
    _require_same(teacher, student)
    weights = np.array([sample["weight"] for sample in teacher])
    gaps = np.array([a["loss"] - b["loss"] for a, b in zip(student, teacher, strict=True)])
    means = _resampled_means(np.array([gaps, weights]))
    difference, spread = gaps.sum() / weights.sum(), means[:, 0] / means[:, 1]
    return {
        "value": float(np.exp(-difference)),
        "interval": _interval(np.exp(-spread)),
        "difference": float(difference),
        "difference_interval": _interval(spread),
        "items": len(gaps),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: that a fair coin splits the discordant items at least this unevenly."""
    discordant = only_first + only_second
    # Python's whole numbers neither overflow nor round; the quotient of two of them is right to the last bit.
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _require_same(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same items of both, got {len(first)} and {len(second)}")


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of `values` [n, items] over items drawn with replacement, the same for all n: [RESAMPLES, n]."""
    generator, items = np.random.default_rng(0), values.shape[1]
    step = max(1, BLOCK // items)
    parts = []
    for start in range(0, RESAMPLES, step):
        drawn = generator.integers(items, size=(min(step, RESAMPLES - start), items))
        parts.append(values[:, drawn].mean(-1).T)
    return np.concatenate(parts)


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, INTERVAL)]

"""Comparing two models on the same items, so that a small difference can be told from noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lolcats_common.records import Paired, Recovery
from lolcats_core.evaluation.recall import mean_and_stderr

RESAMPLES = 2000
CONFIDENCE = 0.95
# Resampled values at a time: 14 000 items of MMLU, 2000 times, would otherwise be gigabytes.
BLOCK = 2**22


def paired_comparison(teacher: Sequence[float], student: Sequence[float]) -> Paired:
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
    comparison: Paired = {
        "difference": difference,
        "stderr": stderr,
        "interval": _interval(lambda before, after: after - before, teacher, student),
        "items": len(teacher),
    }
    if {*teacher, *student} <= {0.0, 1.0}:
        only_teacher = sum(before > after for before, after in zip(teacher, student, strict=True))
        only_student = sum(after > before for before, after in zip(teacher, student, strict=True))
        comparison["only_teacher"], comparison["only_student"] = only_teacher, only_student
        comparison["p_value"] = mcnemar(only_teacher, only_student)
    return comparison


def recovery(teacher: Sequence[float], student: Sequence[float], chance: float | None) -> Recovery:
    """The share of the teacher's score that the student keeps, with 95 % bootstrap intervals over the items.

    Args:
        chance: what guessing reaches. None, or a teacher within two standard errors of it: nothing to correct for.

    Returns:
        ``value`` (student / teacher) and ``interval``; with a `chance` also ``chance_corrected``
        ((student - chance) / (teacher - chance)) and ``chance_corrected_interval``. What would divide by zero is None.
    """
    _require_same(teacher, student)
    before, after = (float(np.mean(scores)) for scores in (teacher, student))
    result: Recovery = {"value": None, "interval": None}
    if before > 0:
        result = {"value": after / before, "interval": _interval(lambda a, b: b / a, teacher, student)}
    if chance is None:
        return result
    result |= {"chance": chance, "chance_corrected": None, "chance_corrected_interval": None}
    above = before - chance
    if above > 2 * mean_and_stderr(teacher)[1] and above > 0:
        result["chance_corrected"] = (after - chance) / above
        result["chance_corrected_interval"] = _interval(
            lambda a, b: (b - chance) / np.maximum(a - chance, 1e-9), teacher, student
        )
    return result


def loss_comparison(teacher: Sequence[Mapping[str, float]], student: Sequence[Mapping[str, float]]) -> Recovery:
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
    difference = float(gaps.sum() / weights.sum())
    interval = _interval(lambda gap, weight: gap / weight, gaps, weights)
    return {
        "value": float(np.exp(-difference)),
        "interval": interval and [float(np.exp(-bound)) for bound in reversed(interval)],
        "difference": difference,
        "difference_interval": interval,
        "items": len(gaps),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: that a fair coin splits the discordant items at least this unevenly."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def _require_same(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same items of both, got {len(first)} and {len(second)}")


def _interval(
    statistic: Callable[[Any, Any], Any], first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> list[float] | None:
    """95 % bootstrap interval (BCa) of a function of two means over the same items; the same at every call.

    Where nearly all items are alike, BCa is not defined and the percentiles of the resamples take its place. None where
    the function is not finite in some resample.
    """
    from scipy.stats import bootstrap

    def of_means(a: np.ndarray, b: np.ndarray, axis: int) -> Any:
        return statistic(a.mean(axis), b.mean(axis))

    if len(first) < 2:
        return [float(statistic(first[0], second[0]))] * 2
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        result = bootstrap(
            (np.asarray(first, np.float64), np.asarray(second, np.float64)),
            of_means,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, BLOCK // len(first)),
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(0),
        )
    if not np.isfinite(result.bootstrap_distribution).all():
        return None
    bounds = np.array(result.confidence_interval)
    if not np.isfinite(bounds).all():
        tail = (1 - CONFIDENCE) / 2
        bounds = np.quantile(result.bootstrap_distribution, [tail, 1 - tail])
    return [float(bound) for bound in bounds]

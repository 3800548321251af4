"""A trial beside its controls (`trials.controls_of`): what the same training gives without linear attention.

A student is worth something beside two others only: its kept softmax with a plain window of its own bytes in place of
what is linear, and its teacher, each after the same stage 2 (docs/quality.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lolcats_core.evaluation.recall import mean_and_stderr

WINDOW, TEACHER = "plain window", "teacher, tuned"


def window_perplexity(result: Mapping[str, Any], step: str) -> float | None:
    """Perplexity of a result's plain window after ``transferred`` or ``finetuned``; None where there is none."""
    control = result.get("controls", {}).get(WINDOW, {}).get(step)
    return control and float(control["perplexity"])


def margins(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """How much better than its plain window a recipe is, over all its seeds: the mean and its standard error.

    Args:
        rows: finished trials of one recipe with their ``controls``, one for each seed.

    Returns:
        By measure, positive where the student is better: ``loss`` of rows of the training length and ``loss at N`` of
        the last range of long rows, in nats; ``needle N`` as a share of items found. Errors hold both what differs from
        item to item, paired, and what differs from seed to seed. Empty where no seed has both models.
    """
    scores: dict[str, list[np.ndarray]] = {}
    for row in rows:
        student, control = row["finetuned"], row["controls"].get(WINDOW, {}).get("finetuned")
        if student is None or control is None:
            continue
        pairs = {name: (control[key], student[key]) for name, key in _losses(student)}
        lengths = student.get("needles", {})
        pairs |= {f"needle {length}": (student["needles"][length], control["needles"][length]) for length in lengths}
        for name, (first, second) in pairs.items():
            scores.setdefault(name, []).append(np.array(first, float) - np.array(second, float))
    found = {}
    for name, seeds in scores.items():
        mean, items = mean_and_stderr(np.mean(seeds, 0).tolist())
        means = [float(each.mean()) for each in seeds]
        between = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
        found[name] = (mean, float(np.hypot(items, between)))
    return found


def _losses(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("loss", "row_losses")]
    if measured.get("long_losses"):
        found.append((f"loss at {measured['positions'][-1]['stop']}", "long_losses"))
    return found

"""By what layers or kv groups are ranked between the stages: one function for each value of `select.criterion`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lolcats_core.model.kv_groups import Group
from lolcats_core.training.attention_transfer import Errors

# The student's KL to the teacher with softmax attention in these kv groups alone.
Divergence = Callable[[frozenset[Group]], float]
# What the teacher loses on each probe with these kv groups cut to a window, for each cut (`retrieval.cut_losses`).
Retrieval = Callable[[Sequence[frozenset[Group]]], list[dict[str, float]]]
# Criteria that need a `Divergence`, or a `Retrieval`.
NEEDS_STUDENT, NEEDS_TEACHER = ("logit_kl", "greedy_kl"), ("retrieval",)


@dataclass(frozen=True)
class Candidate:
    """One kv group of a layer, or the whole layer (`group` None)."""

    layer: int
    group: int | None
    groups: frozenset[Group]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        every: all candidates, in order. count: how many will be kept.
        errors: of stage 1. kv_heads: kv groups of a layer. divergence, retrieval: where the criterion needs them.
    """

    every: list[Candidate]
    count: int
    errors: Errors
    kv_heads: int
    seed: int = 0
    divergence: Divergence | None = None
    retrieval: Retrieval | None = None


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first (at least those that are kept), the value of the criterion by candidate, and its parts."""

    order: tuple[Candidate, ...]
    scores: dict[Candidate, float]
    parts: dict[Candidate, dict[str, float]] = field(default_factory=dict)


def rank(criterion: str, evidence: Evidence) -> Ranking:
    """Rank the candidates by a criterion of `CRITERIA`.

    Raises:
        ValueError: there is no such criterion, or what it needs is missing.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"a criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    return CRITERIA[criterion](evidence)


def by_score(scores: dict[Candidate, float], parts: dict[Candidate, dict[str, float]] | None = None) -> Ranking:
    """The largest first; equal ones in their own order."""
    return Ranking(tuple(sorted(scores, key=lambda candidate: -scores[candidate])), scores, parts or {})


def transfer_error(evidence: Evidence, *, normalized: bool = False) -> Ranking:
    return by_score(transfer_scores(evidence.every, evidence.errors, evidence.kv_heads, normalized=normalized))


def normalized_transfer_error(evidence: Evidence) -> Ranking:
    return transfer_error(evidence, normalized=True)


def logit_kl(evidence: Evidence) -> Ranking:
    """One candidate linear in the whole teacher: what that alone destroys.

    The opposite, softmax in one candidate alone, measures little where a skill needs several of them.
    """
    divergence = _needed(evidence.divergence, "logit_kl", "divergence")
    whole = frozenset(group for candidate in evidence.every for group in candidate.groups)
    return by_score({candidate: divergence(whole - candidate.groups) for candidate in evidence.every})


def greedy_kl(evidence: Evidence) -> Ranking:
    """Lazy greedy (Minoux, 1978): a candidate's gain is taken to shrink as others are kept, so only the one that leads
    by its last known gain is measured again, until it still leads.

    Scores are each candidate's last known gain: how much its softmax lowered the KL.
    """
    divergence = _needed(evidence.divergence, "greedy_kl", "divergence")
    kept: tuple[Candidate, ...] = ()
    held: frozenset[Group] = frozenset()
    current = divergence(held)
    gains = {candidate: float("inf") for candidate in evidence.every}
    while len(kept) < evidence.count:
        fresh: dict[Candidate, float] = {}
        left = [candidate for candidate in evidence.every if candidate not in kept]
        while (lead := max(left, key=lambda candidate: gains[candidate])) not in fresh:
            fresh[lead] = divergence(held | lead.groups)
            gains[lead] = current - fresh[lead]
        kept, held, current = (*kept, lead), held | lead.groups, fresh[lead]
    return Ranking(kept, gains)


def retrieval(evidence: Evidence) -> Ranking:
    """What the teacher loses with one candidate cut to a window, each probe's loss over its sum, summed over probes."""
    measure = _needed(evidence.retrieval, "retrieval", "retrieval")
    losses = dict(zip(evidence.every, measure([candidate.groups for candidate in evidence.every]), strict=True))
    return by_score(shares(losses), losses)


def shares(losses: Mapping[Candidate, Mapping[str, float]]) -> dict[Candidate, float]:
    """The sum over probes of each candidate's share of the losses."""
    totals: dict[str, float] = {}
    for each in losses.values():
        for name, value in each.items():
            totals[name] = totals.get(name, 0.0) + value
    return {
        candidate: sum(value / totals[name] for name, value in each.items() if totals[name] > 0)
        for candidate, each in losses.items()
    }


def at_random(evidence: Evidence) -> Ranking:
    draws = random.Random(evidence.seed)
    return by_score({candidate: draws.random() for candidate in evidence.every})


def even(evidence: Evidence) -> Ranking:
    """As many as are kept, evenly over the depth; there is no score."""
    every, count = evidence.every, evidence.count
    return Ranking(tuple(every[int((i + 0.5) * len(every) / count)] for i in range(count)), {})


CRITERIA: dict[str, Callable[[Evidence], Ranking]] = {
    "transfer_error": transfer_error,
    "normalized_transfer_error": normalized_transfer_error,
    "logit_kl": logit_kl,
    "greedy_kl": greedy_kl,
    "retrieval": retrieval,
    "random": at_random,
    "even": even,
}


def _needed(value: Any, criterion: str, name: str) -> Any:
    if value is None:
        raise ValueError(f"criterion {criterion} needs `{name}`")
    return value


def transfer_scores(
    every: Iterable[Candidate], errors: Errors, groups: int, *, normalized: bool
) -> dict[Candidate, float]:
    """Mean squared error of each candidate's heads, over the mean square of their softmax output with `normalized`.

    Args:
        errors: of a model without softmax heads. groups: kv groups of a layer.
    """

    def of(candidate: Candidate) -> float:
        means = []
        for name in ("error", "power"):
            by_group = np.array(errors[candidate.layer][name]).reshape(groups, -1)
            means.append(float((by_group if candidate.group is None else by_group[candidate.group]).mean()))
        return means[0] / max(means[1], 1e-12) if normalized else means[0]

    return {candidate: of(candidate) for candidate in every}

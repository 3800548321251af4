"""The gates: the conditions under which a registered version may serve, decided from measurements alone.

Nothing here reads a store or a model: `evaluate_gates` takes the evaluation of the version and of the champion and what
`tasks.registry.gate_probe` measured on the stored artifact. A score counts as too low only where it misses its
bound by more than `gates.noise` standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lolcats_common.errors import printable
from lolcats_common.operation_params import GateMode, GatesParams
from lolcats_common.records import Evaluation, Measured
from lolcats_common.tables import markdown_table

Scores = tuple[Measured, Measured]  # teacher's, student's
PROBED = ("loads", "recurrent", "left_padding", "speed", "memory")
GATES = ("perplexity", "task_recovery", "recall_recovery", "earns_bytes", "regression", *PROBED)


@dataclass(frozen=True)
class Check:
    """One comparison of a gate: what was measured against which bound."""

    what: str
    measured: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class GateResult:
    """The checks of one gate. A failed gate refuses the version only in the mode ``enabled``."""

    gate: str
    mode: GateMode
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def refuses(self) -> bool:
        """Whether this gate keeps the version from serving."""
        return self.mode == "enabled" and not self.passed

    @property
    def outcome(self) -> str:
        """One word or two for tables."""
        if not self.checks:
            return "disabled" if self.mode == "disabled" else "nothing to compare"
        return "passed" if self.passed else "FAILED" if self.refuses else "failed (dry run)"


@dataclass(frozen=True)
class GateReport:
    """The results of all gates for one version. `champion`: that it was compared with, None where there was none."""

    name: str
    version: str
    champion: str | None
    results: tuple[GateResult, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate refuses."""
        return not any(result.refuses for result in self.results)

    @property
    def reasons(self) -> list[str]:
        """One line for each check that refuses."""
        return [
            f"{result.gate}: {check.what} is {check.measured}, the bound is {check.bound}"
            for result in self.results
            if result.refuses
            for check in result.checks
            if not check.passed
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, under the keys that stored reports have."""
        values = asdict(self)
        return {**values, "verdicts": values.pop("results"), "passed": self.passed, "reasons": self.reasons}

    def markdown(self) -> str:
        """The report as a Markdown page."""
        against = f"Compared with the champion, version {self.champion}" if self.champion else "There is no champion"
        rows = [
            (
                result.gate,
                result.mode,
                result.outcome if check.passed == result.passed else "passed",
                check.what,
                check.measured,
                check.bound,
            )
            for result in self.results
            for check in result.checks or [Check("", "", "", True)]
        ]
        table = markdown_table(("gate", "mode", "result", "what", "measured", "bound"), rows, align="left")
        outcome = "passed" if self.passed else "REFUSED"
        return f"# Gates of {printable(self.name)} version {self.version}: {outcome}\n\n{against}.\n\n{table}\n"


def evaluate_gates(
    gates: GatesParams, evaluation: Evaluation, champion: Evaluation | None, probe: Mapping[str, Any] | None
) -> tuple[GateResult, ...]:
    """The result of each gate, in the order of `GATES`.

    Args:
        evaluation: the version's; `champion`: the champion's, None where there is none.
        probe: the result of `tasks.registry.gate_probe`, None where no gate asked for it.
    """
    tasks, recall = task_scores(evaluation), recall_scores(evaluation)
    checks: dict[str, Sequence[Check]] = {
        "perplexity": _perplexity(gates, evaluation),
        "task_recovery": list(_recovery(tasks, gates.min_task_recovery, gates.noise)),
        "recall_recovery": list(_recovery(recall, gates.min_recall_recovery, gates.noise)),
        "earns_bytes": list(_earns_bytes(gates, evaluation)),
        "regression": list(_regression(gates, evaluation, champion)) if champion is not None else [],
        **_probed(gates, probe or {}),
    }
    results = []
    for gate in GATES:
        mode: GateMode = getattr(gates, gate)
        results.append(GateResult(gate, mode, () if mode == "disabled" else tuple(checks[gate])))
    return tuple(results)


def ratio(evaluation: Evaluation) -> float:
    """The student's perplexity over its teacher's; NaN where either was not measured."""
    perplexity = evaluation.get("perplexity") or {}
    student, teacher = perplexity.get("finetuned"), perplexity.get("teacher")
    return student / teacher if student and teacher else math.nan


def task_scores(evaluation: Evaluation) -> dict[str, Scores]:
    """Teacher's and student's score on each task."""
    return {name: (task["teacher"], task["finetuned"]) for name, task in (evaluation.get("tasks") or {}).items()}


def recall_scores(evaluation: Evaluation) -> dict[str, Scores]:
    """Teacher's and student's recall at each gap that both were measured at."""
    recall = evaluation.get("recall") or {}
    teacher, student = recall.get("teacher") or {}, recall.get("finetuned") or {}
    gaps = sorted(teacher.keys() & student.keys(), key=int)
    return {f"recall at gap {gap}": (teacher[gap], student[gap]) for gap in gaps}


def _perplexity(gates: GatesParams, evaluation: Evaluation) -> list[Check]:
    value, bound = ratio(evaluation), gates.max_perplexity_ratio
    return [Check("student's perplexity over the teacher's", f"{value:.4g}", f"at most {bound:g}", value <= bound)]


def _share(scores: Scores) -> tuple[float, float] | None:
    """The student's score as a share of the teacher's with its standard error; None where the teacher has none."""
    teacher, student = scores
    if not teacher["value"] > 0:
        return None
    return student["value"] / teacher["value"], (student.get("stderr") or 0.0) / teacher["value"]


def _recovery(scores: Mapping[str, Scores], bound: float, noise: float) -> Iterator[Check]:
    for name, pair in scores.items():
        share = _share(pair)
        if share is not None:
            value, error = share
            measured = f"{value:.3f} ± {error:.3f} of the teacher"
            yield Check(name, measured, f"at least {bound:g}", value + noise * error >= bound)


def _earns_bytes(gates: GatesParams, evaluation: Evaluation) -> Iterator[Check]:
    """The student beside a plain window of its bytes, where both were measured; a tie within noise is not earned."""
    control = evaluation.get("control")
    if control is None:
        return
    student = evaluation["perplexity"]["finetuned"]
    bound = control["perplexity"]
    yield Check("perplexity", f"{student:.4g}", f"below the plain window's {bound:.4g}", student < bound)
    for entry in control["differences"][-1:]:
        least = -gates.noise * entry["stderr"]
        yield Check(
            f"loss at {entry['start']} to {entry['stop']} tokens less the plain window's",
            f"{entry['difference']:+.4f} ± {entry['stderr']:.4f}",
            f"below {least:.4f}",
            entry["difference"] < least,
        )
    recall = (evaluation.get("recall") or {}).get("finetuned") or {}
    for gap in sorted(recall.keys() & control["recall"].keys(), key=int):
        now, plain = recall[gap], control["recall"][gap]
        tolerance = gates.noise * math.hypot(now["stderr"] or 0.0, plain["stderr"] or 0.0)
        yield Check(
            f"recall at gap {gap}",
            f"{now['value']:.3f}",
            f"the plain window's {plain['value']:.3f} less {tolerance:.3f}",
            now["value"] >= plain["value"] - tolerance,
        )


def _regression(gates: GatesParams, evaluation: Evaluation, champion: Evaluation) -> Iterator[Check]:
    """Shares of the teacher are compared, since versions may differ in their teacher and their data."""
    before, after = ratio(champion), ratio(evaluation)
    if not math.isnan(before):
        bound = before * (1 + gates.max_perplexity_regression)
        yield Check("student's perplexity over the teacher's", f"{after:.4g}", f"at most {bound:.4g}", after <= bound)
    for scores in (task_scores, recall_scores):
        new, old = scores(evaluation), scores(champion)
        for name in new:
            now, then = _share(new[name]), _share(old[name]) if name in old else None
            if now is None or then is None:
                continue
            tolerance = gates.noise * math.hypot(now[1], then[1])
            yield Check(
                name,
                f"{now[0]:.3f} of the teacher",
                f"the champion's {then[0]:.3f} less {tolerance:.3f}",
                now[0] >= then[0] - tolerance,
            )


def _probed(gates: GatesParams, probe: Mapping[str, Any]) -> dict[str, list[Check]]:
    if "error" in probe or not probe:
        error = str(probe.get("error", "it was not measured"))
        return {gate: [Check("the stored artifact", error, "loads and generates", False)] for gate in PROBED}
    exact = f"at most {gates.max_logit_difference:g}"
    found: dict[str, list[Check]] = {
        "loads": [Check("the stored artifact", f"wrote {probe['text']!r}", "loads and generates", bool(probe["text"]))]
    }
    for gate, what in (
        ("recurrent", "largest difference between one pass and token by token"),
        ("left_padding", "largest difference between a padded row and the row alone"),
    ):
        value = float(probe[gate])
        found[gate] = [Check(what, f"{value:.2g}", exact, value <= gates.max_logit_difference)]
    speed, memory = float(probe["tokens_per_second"]), float(probe["memory_gib"])
    bound = f"at least {gates.min_tokens_per_second:g}"
    found["speed"] = [Check("tokens per second", f"{speed:.3g}", bound, speed >= gates.min_tokens_per_second)]
    bound = f"at most {gates.max_memory_gib:g}"
    found["memory"] = [Check("weights and decode state, GiB", f"{memory:.3g}", bound, memory <= gates.max_memory_gib)]
    return found

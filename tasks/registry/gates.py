"""The gates: what a registered version must show before it may serve, decided from measurements alone.

Nothing here reads a store or a model: `judge` takes the evaluation of the version and of the champion and what
`tasks.registry.gate_probe` measured on the stored artifact. A score counts as too low only where it misses its
bound by more than `gates.noise` standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lolcats_common.operation_params import GateMode, GatesParams

PROBED = ("loads", "recurrent", "left_padding", "speed", "memory")
GATES = ("perplexity", "task_recovery", "recall_recovery", "regression", *PROBED)


@dataclass(frozen=True)
class Check:
    """One comparison of a gate: what was measured against which bound."""

    what: str
    measured: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What one gate says. A failed gate refuses the version only in the mode ``enabled``."""

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
    def result(self) -> str:
        """One word or two for tables."""
        if not self.checks:
            return "disabled" if self.mode == "disabled" else "nothing to compare"
        return "passed" if self.passed else "FAILED" if self.refuses else "failed (dry run)"


@dataclass(frozen=True)
class GateReport:
    """All verdicts on one version. `champion`: the version it was compared with, None where there was none."""

    name: str
    version: str
    champion: str | None
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate refuses."""
        return not any(verdict.refuses for verdict in self.verdicts)

    @property
    def reasons(self) -> list[str]:
        """One line for each check that refuses."""
        return [
            f"{verdict.gate}: {check.what} is {check.measured}, the bound is {check.bound}"
            for verdict in self.verdicts
            if verdict.refuses
            for check in verdict.checks
            if not check.passed
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed, "reasons": self.reasons}

    def markdown(self) -> str:
        """The report as a Markdown page."""
        against = f"compared with the champion, version {self.champion}" if self.champion else "there is no champion"
        lines = [f"# Gates of {self.name} version {self.version}: {'passed' if self.passed else 'REFUSED'}", ""]
        lines += [f"{against[0].upper()}{against[1:]}.", "", "| gate | mode | result | what | measured | bound |"]
        lines.append("|---|---|---|---|---|---|")
        for verdict in self.verdicts:
            for check in verdict.checks or [Check("", "", "", True)]:
                mark = verdict.result if check.passed == verdict.passed else "passed"
                lines.append(
                    f"| {verdict.gate} | {verdict.mode} | {mark} | {check.what} | {check.measured} | {check.bound} |"
                )
        return "\n".join(lines) + "\n"


def judge(
    gates: GatesParams,
    evaluation: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    probe: Mapping[str, Any] | None,
) -> tuple[Verdict, ...]:
    """The verdict of each gate, in the order of `GATES`.

    Args:
        evaluation: the version's evaluation.json; `champion`: the champion's, None where there is none.
        probe: what `tasks.registry.gate_probe` measured, None where no gate asked for it.
    """
    checks: dict[str, Sequence[Check]] = {
        "perplexity": _perplexity(gates, evaluation),
        "task_recovery": list(_recovery(evaluation_tasks(evaluation), gates.min_task_recovery, gates.noise)),
        "recall_recovery": list(_recovery(evaluation_recall(evaluation), gates.min_recall_recovery, gates.noise)),
        "regression": list(_regression(gates, evaluation, champion)) if champion is not None else [],
        **_probed(gates, probe or {}),
    }
    verdicts = []
    for gate in GATES:
        mode: GateMode = getattr(gates, gate)
        verdicts.append(Verdict(gate, mode, () if mode == "disabled" else tuple(checks[gate])))
    return tuple(verdicts)


def ratio(evaluation: Mapping[str, Any]) -> float:
    """The student's perplexity over its teacher's; NaN where either was not measured."""
    perplexity = evaluation.get("perplexity") or {}
    student, teacher = perplexity.get("finetuned"), perplexity.get("teacher")
    return student / teacher if student and teacher else math.nan


def evaluation_tasks(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each task with the results of ``teacher`` and ``finetuned``."""
    return dict(evaluation.get("tasks") or {})


def evaluation_recall(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each recall gap with the results of ``teacher`` and ``finetuned``."""
    recall = evaluation.get("recall") or {}
    sides = {side: recall.get(side) or {} for side in ("teacher", "finetuned")}
    return {
        f"recall at gap {gap}": {"teacher": result, "finetuned": sides["finetuned"][gap]}
        for gap, result in sides["teacher"].items()
        if gap in sides["finetuned"]
    }


def _perplexity(gates: GatesParams, evaluation: Mapping[str, Any]) -> list[Check]:
    value, bound = ratio(evaluation), gates.max_perplexity_ratio
    return [Check("student's perplexity over the teacher's", f"{value:.4g}", f"at most {bound:g}", value <= bound)]


def _share(result: Mapping[str, Any]) -> tuple[float, float] | None:
    """The student's score as a share of the teacher's with its standard error; None where the teacher has none."""
    teacher, student = result["teacher"]["value"], result["finetuned"]["value"]
    if not teacher > 0:
        return None
    return student / teacher, (result["finetuned"].get("stderr") or 0.0) / teacher


def _recovery(results: Mapping[str, Mapping[str, Any]], bound: float, noise: float) -> Iterator[Check]:
    for name, result in results.items():
        share = _share(result)
        if share is not None:
            value, error = share
            measured = f"{value:.3f} ± {error:.3f} of the teacher"
            yield Check(name, measured, f"at least {bound:g}", value + noise * error >= bound)


def _regression(gates: GatesParams, evaluation: Mapping[str, Any], champion: Mapping[str, Any]) -> Iterator[Check]:
    """Shares of the teacher are compared, since versions may differ in their teacher and their data."""
    before, after = ratio(champion), ratio(evaluation)
    if not math.isnan(before):
        bound = before * (1 + gates.max_perplexity_regression)
        yield Check("student's perplexity over the teacher's", f"{after:.4g}", f"at most {bound:.4g}", after <= bound)
    for scores in (evaluation_tasks, evaluation_recall):
        new, old = scores(evaluation), scores(champion)
        for name in new.keys() & old.keys():
            now, then = _share(new[name]), _share(old[name])
            if now is None or then is None:
                continue
            room = gates.noise * math.hypot(now[1], then[1])
            yield Check(
                name,
                f"{now[0]:.3f} of the teacher",
                f"the champion's {then[0]:.3f} less {room:.3f}",
                now[0] >= then[0] - room,
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

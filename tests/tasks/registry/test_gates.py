"""The gates decide from numbers alone: beyond noise, by mode, with a reason for each refusal."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from lolcats_common.params import GatesParams
from tasks.registry.gates import GATES, PROBED, GateReport, GateResult, evaluate_gates

PROBE = {"text": "pass", "recurrent": 1e-6, "left_padding": 0.0, "tokens_per_second": 50.0, "memory_gib": 0.5}


def evaluation(
    ratio: float = 1.1, task: float = 0.58, recall: float = 0.97, stderr: float = 0.02, teacher: float = 0.6
) -> dict[str, Any]:
    return {
        "perplexity": {"teacher": 10.0, "finetuned": 10.0 * ratio},
        "tasks": {"copy": {"teacher": measured(teacher, stderr), "finetuned": measured(task, stderr)}},
        "recall": {"teacher": {"128": measured(1.0, 0.0)}, "finetuned": {"128": measured(recall, stderr)}},
    }


def measured(value: float, stderr: float) -> dict[str, float]:
    return {"value": value, "stderr": stderr}


def results(
    new: dict[str, Any] | None = None,
    champion: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
    **gates: Any,
) -> dict[str, GateResult]:
    chosen = GatesParams(**({"recall_recovery": "enabled"} | gates))
    found = evaluate_gates(chosen, evaluation() if new is None else new, champion, {**PROBE, **(probe or {})})
    assert [result.gate for result in found] == list(GATES)
    return {result.gate: result for result in found}


def test_checks_of_recall_stand_in_the_order_of_their_gaps() -> None:
    by_gap = {gap: measured(1.0, 0.0) for gap in ("1024", "128", "64")}
    long = {**evaluation(), "recall": {"teacher": by_gap, "finetuned": by_gap}}
    found = results(new=long, champion=long)
    for gate in ("recall_recovery", "regression"):
        gaps = [check.what for check in found[gate].checks if "gap" in check.what]
        assert gaps == ["recall at gap 64", "recall at gap 128", "recall at gap 1024"]


def beside(window: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with a control of perplexity 12, long loss .1 ± .02 above the student's and recall .5."""
    control = {
        "perplexity": 12.0,
        "recall": {"128": measured(0.5, 0.02)},
        "differences": [{"start": 1024, "stop": 2048, "difference": -0.1, "stderr": 0.02}],
    }
    return {**evaluation(), "control": control | window}


@pytest.mark.parametrize(
    ("window", "failed"),
    [
        ({}, []),
        ({"perplexity": 10.9}, ["perplexity"]),
        (
            {"differences": [{"start": 1024, "stop": 2048, "difference": -0.03, "stderr": 0.02}]},
            ["loss at 1024 to 2048"],
        ),
        ({"recall": {"128": measured(0.96, 0.02)}}, []),
        ({"recall": {"128": measured(1.0, 0.0)}, "perplexity": 11.0}, ["perplexity"]),
        ({"differences": []}, []),
    ],
)
def test_a_student_earns_its_bytes_where_it_is_better_than_a_plain_window_beyond_noise(
    window: dict[str, Any], failed: list[str]
) -> None:
    found = results(new=beside(window), earns_bytes="enabled")["earns_bytes"]
    assert [check.what for check in found.checks if not check.passed] == [
        what for check in found.checks for what in [check.what] if any(what.startswith(name) for name in failed)
    ]
    assert found.refuses == bool(failed)


def test_without_a_control_there_is_nothing_to_earn() -> None:
    assert results()["earns_bytes"].outcome == "nothing to compare"
    assert results(new={**evaluation(), "control": None})["earns_bytes"].outcome == "nothing to compare"


def refusing(**given: Any) -> list[str]:
    return [name for name, result in results(**given).items() if result.refuses]


def test_a_good_version_passes_every_gate_alone_and_against_its_equal() -> None:
    assert refusing() == []
    assert refusing(champion=evaluation()) == []


@pytest.mark.parametrize(
    ("given", "gate"),
    [
        ({"new": evaluation(ratio=1.6)}, "perplexity"),
        ({"new": evaluation(ratio=math.nan)}, "perplexity"),
        ({"new": {}}, "perplexity"),
        ({"new": evaluation(task=0.3)}, "task_recovery"),
        ({"new": evaluation(recall=0.5)}, "recall_recovery"),
        ({"champion": evaluation(ratio=1.0)}, "regression"),
        ({"champion": evaluation(task=0.7)}, "regression"),
        ({"new": evaluation(recall=0.9), "champion": evaluation(recall=1.0)}, "regression"),
        ({"probe": {"text": ""}}, "loads"),
        ({"probe": {"recurrent": 0.5}}, "recurrent"),
        ({"probe": {"recurrent": math.nan}}, "recurrent"),
        ({"probe": {"left_padding": 0.5}}, "left_padding"),
        ({"probe": {"tokens_per_second": 0.1}, "speed": "enabled"}, "speed"),
        ({"probe": {"memory_gib": 100.0}, "memory": "enabled"}, "memory"),
    ],
)
def test_each_gate_refuses_what_it_is_for_and_dry_runs_and_disabled_gates_do_not(
    given: dict[str, Any], gate: str
) -> None:
    assert refusing(**given) == [gate]
    dry = results(**(given | {gate: "dry_run"}))[gate]
    assert (dry.passed, dry.refuses) == (False, False)
    assert results(**(given | {gate: "disabled"}))[gate].checks == ()


def test_a_score_within_the_noise_of_its_bound_passes() -> None:
    wide, narrow = evaluation(task=0.5, stderr=0.03), evaluation(task=0.5, stderr=0.001)
    assert refusing(new=wide) == []
    assert refusing(new=narrow) == ["task_recovery"]
    assert refusing(new=wide, noise=0.0) == ["task_recovery"]
    assert refusing(new=evaluation(task=0.58, stderr=0.03), champion=evaluation(task=0.6, stderr=0.03)) == []


def test_versions_are_compared_as_shares_of_their_own_teacher() -> None:
    assert refusing(new=evaluation(task=0.38, teacher=0.4), champion=evaluation(task=0.57, teacher=0.6)) == []


def test_a_teacher_that_scores_nothing_says_nothing() -> None:
    assert results(new=evaluation(task=0.0, teacher=0.0))["task_recovery"].checks == ()


def test_an_artifact_that_does_not_load_fails_every_gate_that_needs_it() -> None:
    found = evaluate_gates(GatesParams(), evaluation(), None, {"error": "OSError: no config.json"})
    assert [v.gate for v in found if not v.passed] == list(PROBED)
    report = GateReport("m", "2", None, found)
    assert not report.passed
    assert "OSError: no config.json" in report.reasons[0]


def test_the_report_says_what_was_measured_against_which_bound() -> None:
    found = evaluate_gates(GatesParams(), evaluation(ratio=2.0), evaluation(), PROBE)
    report = GateReport("m", "3", "2", found)
    page = report.markdown()
    assert "version 3: REFUSED" in page
    assert "Compared with the champion, version 2." in page
    row = "| perplexity | enabled | FAILED | student's perplexity over the teacher's | 2 | at most 1.5 |"
    assert row in re.sub(" +", " ", page)
    assert report.reasons == [
        "perplexity: student's perplexity over the teacher's is 2, the bound is at most 1.5",
        "regression: student's perplexity over the teacher's is 2, the bound is at most 1.122",
    ]
    assert report.to_dict()["passed"] is False
    assert len(report.to_dict()["verdicts"]) == len(GATES)

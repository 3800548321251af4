"""Two evaluated students beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.files import write_json, write_text
from tasks.studies.compare import compare, load, show
from tests.tasks.test_report import EVALUATION


def evaluated(folder: Path, scores: list[float], **changed: Any) -> Path:
    write_json(folder / "evaluation.json", {**EVALUATION, **changed})
    lines = [json.dumps({"id": n, "teacher": 1.0, "finetuned": score}) for n, score in enumerate(scores)]
    write_text(folder / "samples" / "needle.jsonl", "\n".join(lines) + "\n")
    return folder


def rows(compared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["measure"]: row for row in compared["rows"]}


def test_items_are_paired_where_the_questions_were_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluated(tmp_path / "a", [1.0] * 9 + [0.0] * 3)
    second = evaluated(tmp_path / "b", [0.0] * 9 + [0.0] * 3)
    compared = compare(*(load(tmp_path, "demo", str(folder)) for folder in (first, second)))
    found = rows(compared)
    assert found["needle (acc)"]["difference"] == -0.75
    assert found["needle (acc)"]["p_value"] == 2 / 2**9
    assert [measure for measure in found if "gap" in measure] == [
        "copying recall at gap 64",
        "copying recall at gap 1024",
    ]
    assert found["perplexity, finetuned"]["first"] == 10.0
    assert found["audit, linear off"]["second"] == 10.1
    assert "audit, window off" not in found  # it diverged
    assert compared["notes"] == ["<piqa>: different questions, so the items cannot be paired"]
    show(compared)
    shown = capsys.readouterr().out
    assert "-0.75" in shown
    assert "0.00391" in shown


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "a", [1.0, 0.0])
    second = evaluated(
        tmp_path / "b",
        [1.0],
        task_hashes={"needle": "abc"},
        perplexity_tokens=7,
        tasks={"needle": EVALUATION["tasks"]["needle"]},
    )
    compared = compare(*(load(tmp_path, "demo", str(folder)) for folder in (first, second)))
    assert "p_value" not in rows(compared)["needle (acc)"]
    notes = " ".join(compared["notes"])
    for said in ("different numbers of tokens", "no sample log with a score per item", "<piqa>: not measured on"):
        assert said in notes


def test_what_was_never_evaluated_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for which in ("current", str(tmp_path / "empty")):
        with pytest.raises(UserError, match=r"evaluation.json is missing; run `dvc repro evaluate`"):
            load(tmp_path, "demo", which)

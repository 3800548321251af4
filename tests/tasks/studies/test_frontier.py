"""`lolcats frontier`: every budget from one attention transfer, its table and its plot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import ComputeParams, EvaluateParams, FinetuneParams, LinearizeConfig, Params, TransferParams
from lolcats_core.data.rows import TokenRowsWriter
from lolcats_core.experiments import trials
from lolcats_core.teacher.pin import Teacher
from tasks.studies import frontier
from tasks.versioning import dvc_graph
from tests.core.tiny import byte_teacher, byte_tokenizer, tokens

TRAINING: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "max_eval_rows": 2}
PARAMS = Params(
    compute=ComputeParams(device="cpu"),
    linearize=LinearizeConfig(window_size=16, feature_dim=8),
    transfer=TransferParams(**TRAINING),
    finetune=FinetuneParams(**TRAINING),
    evaluate=EvaluateParams(
        batch_size=4, max_perplexity_rows=4, recall_gaps=(12, 20), recall_samples=2, generation_tokens=4, audit_rows=2
    ),
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose teacher and rows are there."""
    for name, rows in (("train", 12), ("validation", 6)):
        with TokenRowsWriter(tmp_path / "outputs" / "prepare" / name, sequence_length=64, vocab_size=257) as writer:
            writer.append(input_ids=tokens(rows, 64, seed=rows).numpy())
    monkeypatch.setattr(dvc_graph, "repro", lambda *_: None)
    teacher = SimpleNamespace(load=lambda dtype, device: byte_teacher(), tokenizer=byte_tokenizer)
    monkeypatch.setattr(Teacher, "open", lambda folder: teacher)
    return tmp_path


def test_one_transfer_serves_every_budget_and_the_curve_ends_at_the_teacher(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers: list[int] = []
    original = trials.attention_transfer
    monkeypatch.setattr(trials, "attention_transfer", lambda *a, **k: (transfers.append(1), original(*a, **k))[1])
    report = frontier.frontier(root, PARAMS, (0.0, 0.5, 0.75))
    assert len(transfers) == 1
    assert [point["selection"]["cache_ratio"] for point in report["points"]] == [0.0, 0.5, 0.75]
    states = [point["finetuned"]["state"] for point in report["points"]]
    assert [state["per_token"] for state in states] == [0.0, 2 * 2 * 8 * 4, 3 * 2 * 8 * 4]
    assert json.loads((root / "reports" / "frontier.json").read_text()) == json.loads(json.dumps(report))
    text = (root / "reports" / "frontier.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[4:]] == ["0.0%", "50.0%", "75.0%"]
    assert text.splitlines()[2].count("recall") == 4
    assert (root / "reports" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_without_stage_2_the_table_has_the_transferred_student_alone(root: Path) -> None:
    report = frontier.frontier(root, PARAMS, (0.25,), finetune=False)
    assert "finetuned" not in report["points"][0]
    assert "finetuned" not in frontier.markdown(report)
    assert len(frontier.figure(report).axes) == 2


def test_a_diverged_point_is_said(root: Path) -> None:
    report = frontier.frontier(root, PARAMS, (0.25,), finetune=False)
    report["points"][0]["transferred"] = None
    assert "| diverged |" in re.sub(" +", " ", frontier.markdown(report))
    frontier.figure(report)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [((1.0,), r"`--ratio` must lie in \[0, 1\), got 1.0"), ((0.1,), "which keeps 0")],
)
def test_ratios_that_keep_nothing_or_everything_are_refused_before_training(
    root: Path, ratios: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        frontier.frontier(root, replace(PARAMS), ratios)
    assert not list((root / ".scratch").rglob("*.safetensors"))

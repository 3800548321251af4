"""The final table and reports/summary.json hold the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from tasks.registry.register import RegisteredVersion
from tasks.registry.versions import VersionStatus
from tasks.reporting import summary
from tasks.versioning.dvc_graph import Reproduced
from tests import golden


def long_rows(loss: float) -> dict[str, Any]:
    ranges = [{"start": 1024, "stop": 2048, "loss": loss, "stderr": 0.01, "tokens": 2048}]
    return {"rows": 2, "length": 2048, "ranges": ranges}


EVALUATION: dict[str, Any] = {
    "perplexity": {"teacher": 8.0, "swapped": 1600.0, "transferred": 16.0, "finetuned": 10.0, "bigram": 300.0},
    "recall": {
        "teacher": {"128": {"value": 0.9, "stderr": 0.02}, "256": {"value": 0.8, "stderr": None}},
        "finetuned": {"128": {"value": 0.1, "stderr": 0.03}, "256": {"value": 0.05, "stderr": 0.01}},
    },
    "tasks": {
        "code_continuation": {
            "metric": "acc",
            "teacher": {"value": 0.75, "stderr": 0.043},
            "finetuned": {"value": 0.7, "stderr": 0.046},
            "items": 100,
        }
    },
    "positions": {side: long_rows(loss) for side, loss in (("teacher", 1.5), ("finetuned", 1.75))},
    "control": {
        "window": 147,
        "sinks": 4,
        "tokens": 2048,
        "bytes": 1_999_000,
        "student_bytes": 2_000_000,
        "perplexity": 11.0,
        "recall": {"128": {"value": 0.2, "stderr": 0.03}, "256": {"value": 0.01, "stderr": 0.01}},
        "positions": long_rows(1.875),
        "differences": [{"start": 1024, "stop": 2048, "difference": -0.125, "stderr": 0.01}],
    },
    "lm_eval_version": "0.4.13",
    "task_hashes": {},
}
STAGES = [Reproduced("finetune", "ran", 12.0), Reproduced("evaluate", "restored", 1.0)]
VERSION = RegisteredVersion("lolcats-demo", "4", "candidate", True, "run")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Outputs of two stages."""
    for stage, metrics in {
        "finetune": {"stage_seconds": 99.6, "tokens": 400000, "trainable_parameters": 20, "total_parameters": 1000},
        "evaluate": {"stage_seconds": 30.2},
    }.items():
        (tmp_path / "outputs" / stage).mkdir(parents=True)
        (tmp_path / "outputs" / stage / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "outputs" / "evaluate" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path


def test_the_table_shows_every_number_that_the_report_holds(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(Path.cwd() / ".venv" / "bin" / "python"))
    status = VersionStatus("4", False, "perplexity: it is 2, the bound is at most 1.5", ("candidate",))
    built = summary.build(root, STAGES, VERSION, "parent", "set-1", status)
    report = json.loads(summary.write(root, built).read_text())
    assert report["perplexity"] == EVALUATION["perplexity"]
    assert report["perplexity_ratio"]["finetuned"] == 1.25
    assert report["recall"] == EVALUATION["recall"]
    assert report["stages"]["finetune"]["trainable_share"] == 0.02
    assert report["stages"]["evaluate"] == {"state": "restored", "seconds": 30.2, "wall_seconds": 1.0}
    assert report["registered"]["uri"] == "models:/lolcats-demo/4"
    assert report["gates"] == {"passed": False, "reasons": status.reasons, "aliases": ["candidate"]}
    summary.show(built)
    shown = capsys.readouterr().out
    golden.check(shown, "summary.txt")
    golden.check(summary.markdown(built), "summary.md")
    assert summary.headline(built)["recall/finetuned/gap_128"] == 0.1


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_missing_or_damaged_results_are_named(root: Path, content: str | None) -> None:
    path = root / "outputs" / "evaluate" / "evaluation.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        summary.build(root, STAGES)
    assert not (root / summary.REPORT).exists()

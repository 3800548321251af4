"""The report: one page with every number, well-formed, and nothing in it that needs a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from tasks import report
from tests.tasks.test_evaluate import PARAMS, FakeStage

ROOT = Path(__file__).parents[2]
MEASURED = {"value": 0.5, "stderr": 0.125}
TASK: dict[str, Any] = {
    "metric": "acc",
    "items": 8,
    "version": "1.0",
    "chance": 0.25,
    "higher_is_better": True,
    "teacher": {"value": 0.75, "stderr": 0.1, "metrics": {}},
    "finetuned": {**MEASURED, "metrics": {}},
    "paired": {"difference": -0.25, "stderr": 0.1, "interval": [-0.5, 0.0], "items": 8, "p_value": 0.5},
    "recovery": {
        "value": 0.667,
        "interval": [0.4, 0.9],
        "chance": 0.25,
        "chance_corrected": 0.512,
        "chance_corrected_interval": [0.2, 0.8],
    },
}
SELECTION = {
    "criterion": "transfer_error",
    "softmax_budget": {"layers": 1},
    "cache_ratio": 0.5,
    "candidates": [{"layer": i, "group": None, "score": 0.5 + i, "kept": (None, 0)[i]} for i in range(2)],
    "linearize": {},
}
CELLS = [{"length": 128, "depth": 0.5, "value": 0.5, "stderr": 0.1}]
RANGES = {"rows": 1, "length": 128, "ranges": [{"start": 0, "stop": 64, "loss": 2.0, "stderr": 0.1, "tokens": 63}]}
EVALUATION: dict[str, Any] = {
    "perplexity": {"teacher": 8.0, "swapped": 160.0, "transferred": 16.0, "finetuned": 10.0, "bigram": 300.0},
    "perplexity_tokens": 100,
    "recall": {step: {"1024": MEASURED, "64": MEASURED} for step in ("teacher", "finetuned")},
    "recall_samples": 4,
    "tasks": {
        "<piqa>": TASK,
        "needle": {**TASK, "chance": 0.0, "cells": {"teacher": CELLS, "finetuned": CELLS}},
        "wikitext": {
            **{key: TASK[key] for key in ("items", "version")},
            "metric": "word_perplexity",
            "chance": None,
            "higher_is_better": False,
            "teacher": {"value": 17.5e6, "stderr": 0.0, "metrics": {}},
            "finetuned": {"value": 18.5e6, "stderr": 0.0, "metrics": {}},
            "recovery": {"value": 0.9, "interval": [0.8, 1.0], "difference": 0.1, "difference_interval": [0.0, 0.2]},
        },
    },
    "positions": {"teacher": RANGES, "finetuned": RANGES},
    "control": {
        "window": 147,
        "sinks": 4,
        "tokens": 2048,
        "bytes": 5999,
        "student_bytes": 6000,
        "perplexity": 11.5,
        "recall": {"1024": MEASURED, "64": MEASURED},
        "positions": RANGES,
        "differences": [{"start": 0, "stop": 64, "difference": -0.125, "stderr": 0.015625}],
    },
    "generation": {
        **{name: MEASURED for name in ("exact_prefix", "token_f1", "same_stop")},
        **{f"{name}_{step}": MEASURED for name in ("repetition", "stopped") for step in ("teacher", "finetuned")},
        "prompts": 2,
        "prompt_tokens": 16,
        "new_tokens": 8,
    },
    "state": {"linear": 5000, "exact": 1000, "per_token": 0, "published": 8000, "teacher_per_token": 64},
    "audit": {
        "whole": 10.0,
        "linear_off": 10.1,
        "window_off": None,
        "layers": {"0": {"linear_off": 10.05}, "1": {"softmax_off": 30.0}},
        "entropy": {"0": [1.0, 2.0], "1": [0.5, 0.5]},
        "head_errors": {"0": [0.1, 0.0]},
        "linear_mass": {"0": [0.3, 0.7]},
    },
    "lm_eval_version": "0.4.13",
    "task_hashes": {"needle": "abc"},
}
HISTORY = [
    {"step": 0, "validation_loss": 5.0, "validation_layer_000": 1.0},
    {"step": 2, "train_loss": 4.0},
    {"step": 2, "validation_loss": 3.0, "validation_layer_000": 0.5},
]


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


class ReportStage(FakeStage):
    """Also takes texts for MLflow."""

    def log_text(self, name: str, text: str) -> None:
        self.texts = {name: text}


def make(root: Path, evaluation: dict[str, Any]) -> ReportStage:
    for name in report.STAGES:
        write_json(root / name / "metrics.json", {"tokens": 4321, "stage_seconds": 12.5})
        write_json(root / name / "run.json", {"run_id": f"run-of-{name}", "key": "k"})
    write_json(root / "evaluate" / "evaluation.json", evaluation)
    write_json(root / "evaluate" / "speed.json", {s: {"cache_bytes": 777.0} for s in ("teacher", "finetuned")})
    write_json(root / "teacher" / "teacher.json", {"source": "builtin", "revision": None})
    write_json(root / "select" / "selection.json", SELECTION)
    for name in ("transfer", "finetune"):
        (root / name / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    return ReportStage(root, root / "work", PARAMS)


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_the_page_says_everything_and_needs_nothing(tmp_path: Path) -> None:
    stage = make(tmp_path, EVALUATION)
    metrics = report.run(stage)  # type: ignore[arg-type]
    page = read(stage.out / "report.html")
    assert metrics["bytes"] == len((stage.out / "report.html").read_bytes())
    assert stage.texts["report.html"] == (stage.out / "report.html").read_text(encoding="utf-8")
    assert page.tags.count("img") == 12
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert "url(" not in (stage.out / "report.html").read_text(encoding="utf-8")
    for said in ("<piqa>", "run-of-finetune", "4,321", "777"):  # the rest of the page: reporting/test_report_html.py
        assert said in page.text, said


def test_a_run_that_measured_little_still_has_a_report(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"recall": {"teacher": {}, "finetuned": {}}, "tasks": {}, "positions": {}, "control": None}
    evaluation = {**EVALUATION, **empty, "generation": {}, "audit": {}, "task_hashes": {}}
    stage = make(tmp_path, evaluation)
    for name in ("transfer", "finetune"):
        (tmp_path / name / "history.jsonl").write_text("")
    write_json(tmp_path / "select" / "selection.json", {**SELECTION, "candidates": []})
    report.run(stage)  # type: ignore[arg-type]
    assert read(stage.out / "report.html").tags.count("img") == 1


def test_dvc_plots_losses_recall_and_positions(tmp_path: Path) -> None:
    stage = make(tmp_path, EVALUATION)
    report.run(stage)  # type: ignore[arg-type]
    root = tmp_path / "project"
    shutil.copytree(stage.out, root / "outputs" / "report")
    plots = [entry for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] if isinstance(entry, dict)]
    (root / "dvc.yaml").write_text(yaml.safe_dump({"plots": plots}))
    for command in (["init", "--no-scm", "-q"], ["plots", "show", "--json"]):
        done = subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert "errors" not in shown
    points = {name: drawn["content"]["data"]["values"] for name, (drawn,) in shown["data"].items()}
    for name in ("transfer loss", "finetune loss"):
        found = [(point["filename"], point["step"], point["loss"]) for point in points[name]]
        assert found == [("training.json", 2, 4.0), ("validation.json", 0, 5.0), ("validation.json", 2, 3.0)]
    found = [(point["field"], point["gap"], point["teacher"]) for point in points["copying recall"]]
    assert found == [(model, gap, 0.5) for model in ("teacher", "finetuned") for gap in (64, 1024)]
    assert [(point["position"], point["finetuned"]) for point in points["loss by position"]] == [(64, 2.0)] * 2


def test_the_same_results_make_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        stage = make(tmp_path / name, EVALUATION)
        report.run(stage)  # type: ignore[arg-type]
        pages.append((stage.out / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    stage = make(tmp_path, EVALUATION)
    (tmp_path / "evaluate" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation.json cannot be read .*run `dvc repro evaluate`"):
        report.run(stage)  # type: ignore[arg-type]


def test_the_training_length_is_that_of_the_rows(tmp_path: Path) -> None:
    stage = make(tmp_path, EVALUATION)
    stage.params = replace(PARAMS, data=replace(PARAMS.data, sequence_length=96))
    report.run(stage)  # type: ignore[arg-type]
    assert (stage.out / "positions.svg").is_file()

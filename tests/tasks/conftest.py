"""A project with a finished run whose model is a real, tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import lolcats_core as lc
from tasks.versioning import dvc_graph
from tests.core.tiny import byte_teacher, byte_tokenizer


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linearized Llama of a few thousand parameters with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    student = lc.linearize(byte_teacher(), lc.LinearizeConfig(window_size=16, feature_dim=8))
    student.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def finished(fake_project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose outputs are there and up to date, as far as DVC is asked."""
    outputs = fake_project / "outputs"
    (outputs / "finetune").mkdir(parents=True)
    (outputs / "finetune" / "model").symlink_to(tiny_model)
    (outputs / "finetune" / "run.json").write_text(json.dumps({"run_id": "r-finetune"}))
    (outputs / "evaluate").mkdir()
    measured = {"value": 0.5, "stderr": 0.1}
    evaluation = {
        "perplexity": {"teacher": 10.0, "finetuned": 12.0},
        "tasks": {"code_continuation": {"teacher": measured, "finetuned": measured}},
        "lm_eval_version": "0.4",
        "task_hashes": {"code_continuation": "h"},
    }
    (outputs / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    set_model(fake_project, "m1")
    monkeypatch.setattr(dvc_graph, "changed", lambda root, anew=False: {})
    monkeypatch.setattr(dvc_graph, "push_if_remote", lambda root: False)
    return fake_project


def set_model(root: Path, md5: str) -> None:
    stages = {
        "finetune": {"outs": [{"path": "outputs/finetune", "md5": "out"}]},
        "evaluate": {"deps": [{"path": "outputs/finetune/model", "md5": md5}], "outs": []},
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))

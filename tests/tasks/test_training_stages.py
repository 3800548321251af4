"""The stages `transfer` and `finetune` on a model that is never whole in memory, alone and in two processes."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lolcats_common.errors import UserError
from lolcats_common.params import apply_overrides, params_from_dict, read_yaml
from lolcats_core import attention_transfer, linearize, load_delta
from lolcats_core.data.rows import TokenRows, TokenRowsWriter
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.teacher.pin import Teacher, resolve_teacher, write_pin
from tasks.runner import preflight
from tasks.runner import stage as harness
from tests.core.tiny import byte_teacher, byte_tokenizer

ROOT = Path(__file__).parents[2]
TRAINING = {"batch_size": 4, "epochs": 1, "max_steps": 2, "eval_every": 2, "max_eval_rows": 4, "log_every": 1}
OVERRIDES: dict[str, Any] = {
    "teacher": {"source": "./model"},
    "data": {"sequence_length": 32},
    "linearize": {"window_size": 8, "feature_dim": 8},
    "transfer": TRAINING,
    "select.softmax_budget": None,
    "finetune": {**TRAINING, "lora_rank": 2},
    "evaluate": {"recall_gaps": [8], "tasks": []},
}
# One of four kv groups keeps softmax.
KEPT = {"select.softmax_budget": {"cache_ratio": 0.25}}
# What both modes decide alike: no clipping.
STREAMED = {"transfer.mode": "streamed", "transfer.max_grad_norm": 1e9}


@pytest.fixture
def project(tmp_path: Path, empty_store: Path) -> Path:
    """A project whose stages `teacher` and `prepare` are done."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("lolcats_common", "lolcats_core", "kernels", "tasks"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", root)
    shutil.copy(empty_store, root / "mlflow.db")
    byte_teacher(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(
        root / "model", max_shard_size="60KB"
    )
    byte_tokenizer().save_pretrained(root / "model")
    configure(root)
    (root / "outputs" / "teacher").mkdir(parents=True)
    params = params_from_dict(read_yaml(root / "params.yaml"))
    write_pin(resolve_teacher(params.teacher, root), root, root / "outputs" / "teacher")
    draws = np.random.default_rng(0)
    for name, rows in (("train", 8), ("validation", 4)):
        with TokenRowsWriter(root / "outputs" / "prepare" / name, sequence_length=32, vocab_size=257) as writer:
            writer.append(input_ids=draws.integers(1, 257, (rows, 32)))
    return root


def configure(root: Path, **overrides: Any) -> None:
    """Write params.yaml."""
    values = apply_overrides(read_yaml(ROOT / "params.yaml"), OVERRIDES)
    (root / "params.yaml").write_text(yaml.safe_dump(apply_overrides(values, overrides)))


def run(root: Path, stage: str) -> dict[str, float]:
    """The metrics of one stage, run as dvc runs it."""
    environment = {**os.environ, "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), str(ROOT)])
    command = [sys.executable, "-m", f"tasks.{stage}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "outputs" / stage / "metrics.json").read_text())


def joint(root: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Maps and best validation loss of stage 1 in this process."""
    params = params_from_dict(read_yaml(root / "params.yaml"))
    student = linearize(Teacher.open(root / "outputs" / "teacher").load(torch.float32, "cpu"), params.linearize)
    rows = [TokenRows.open(root / "outputs" / "prepare" / name) for name in ("train", "validation")]
    result = attention_transfer(student, *rows, params.transfer, scratch=root / "joint")
    return {name: p.detach() for name, p in named_map_parameters(student).items()}, result.best_loss


def test_a_row_within_the_window_is_refused_before_anything_is_trained() -> None:
    teacher = byte_teacher().config
    values = apply_overrides(read_yaml(ROOT / "params.yaml"), OVERRIDES)
    preflight.check(params_from_dict(values), teacher)
    wide = params_from_dict(apply_overrides(values, {"linearize.window_size": 16}))
    with pytest.raises(UserError, match=r"`data\.sequence_length` must be above 32 tokens, .* 16 sees .*, got 32"):
        preflight.check(wide, teacher)


@pytest.mark.parametrize("name", ["prepare", "transfer", "select", "finetune", "evaluate"])
def test_what_a_later_stage_would_refuse_is_refused_before_each_stage_that_takes_long(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(project, **{"finetune.target_modules": ["nothing"]})
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [name])
    for harness_part in ("setup_logging", "scratch_key"):  # the outputs of the stages before it are not made
        monkeypatch.setattr(harness, harness_part, lambda *arguments: "key")
    monkeypatch.setattr(harness.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(harness.Run, "start", lambda *arguments, **options: pytest.fail("the stage began"))
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(ROOT / "tasks" / f"{name}.py"), run_name="__main__")
    assert f"{name}: `finetune.target_modules`: the model has no 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
def test_streamed_and_quantized_in_two_processes_gives_models_that_load(project: Path) -> None:
    configure(project, **{"compute.processes": 2, "finetune.quantize_base": True}, **KEPT, **STREAMED)
    metrics = run(project, "transfer")
    maps, best = joint(project)
    assert metrics["streamed"] == 1.0
    assert metrics["best_validation_loss"] == pytest.approx(best, rel=1e-5)
    for name, value in load_file(project / "outputs" / "transfer" / "feature_maps.safetensors").items():
        torch.testing.assert_close(maps[name], value, rtol=1e-3, atol=1e-4)
    assert not (project / ".scratch" / "transfer").exists()

    run(project, "select")
    run(project, "finetune")
    kept = json.loads((project / "outputs" / "select" / "selection.json").read_text())["linearize"]["softmax_heads"]
    assert sum(len(groups) for groups in kept.values()) == 1
    merged = AutoModelForCausalLM.from_pretrained(project / "outputs" / "finetune" / "model")
    delta: Any = load_delta(project / "outputs" / "finetune" / "adapter", project / "model", merge=True)
    assert merged.config.linearize["softmax_heads"] == kept
    expected = dict(merged.named_parameters())
    for name, value in delta.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.slow
def test_joint_over_divided_weights_is_the_joint_run_alone(project: Path) -> None:
    configure(project, **{"compute.processes": 2})
    metrics = run(project, "transfer")
    assert metrics["streamed"] == 0.0
    assert metrics["best_validation_loss"] == pytest.approx(joint(project)[1], rel=1e-5)

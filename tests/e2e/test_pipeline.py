"""The real pipeline on a tiny teacher: everything runs, nothing runs twice, and a kill anywhere changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lolcats_common.files import sha256_file
from lolcats_common.params import apply_overrides, read_yaml
from tests.conftest import run_git
from tests.core.tiny import tiny_teacher, tiny_tokenizer
from tests.tasks.processes import processes_in

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TINY: dict[str, Any] = {
    "teacher.source": "./tiny",
    "data": {"sequence_length": 512, "max_train_tokens": 512 * 60, "max_validation_tokens": 512 * 40},
    "linearize": {"window_size": 16, "feature_dim": 16},
    "select.softmax_budget": {"cache_ratio": 0.25},
    "transfer": {"batch_size": 2, "eval_every": 6, "max_eval_rows": 8, "checkpoint_every": 2, "log_every": 3},
    "finetune": {
        "batch_size": 2,
        "max_steps": None,
        "eval_every": 6,
        "max_eval_rows": 8,
        "checkpoint_every": 2,
        "log_every": 3,
    },
    "evaluate": {
        "max_perplexity_rows": 8,
        "recall_gaps": [16],
        "recall_samples": 2,
        "task_limit": 20,
        "synthetic_lengths": [512],
        "synthetic_samples": 1,
        "long_rows": 1,
        "generation_prompts": 2,
        "generation_tokens": 8,
        "audit_rows": 2,
    },
    "register.name": "lolcats-e2e",
}
WEIGHTS = ("outputs/transfer/feature_maps.safetensors", "outputs/finetune/model/model.safetensors")


def make_project(root: Path) -> Path:
    """A clone of this checkout's files with tiny parameters and a tiny teacher in a directory."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    tokenizer = tiny_tokenizer()
    teacher = tiny_teacher(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    teacher.save_pretrained(root / "tiny")
    tokenizer.save_pretrained(root / "tiny")
    values = apply_overrides(read_yaml(ROOT / "params.yaml"), TINY)
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    run_git(root, "init", "--quiet")
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "start")
    return root


def call(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def succeed(root: Path, *command: str) -> str:
    done = call(root, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after one whole `lolcats run`; its table is in table.txt."""
    root = make_project(tmp_path_factory.mktemp("e2e") / "project")
    (root / "table.txt").write_text(succeed(root, "lolcats", "run"))
    return root


def test_the_table_and_the_report_show_the_same_run(project: Path) -> None:
    table, report = (project / "table.txt").read_text(), json.loads((project / "reports/summary.json").read_text())
    assert set(report["perplexity"]) == {"teacher", "swapped", "transferred", "finetuned", "bigram"}
    for step in ("teacher", "finetuned"):
        assert f"{report['perplexity'][step]:.4g}"[:4] in table
    page = (project / "outputs/report/report.html").read_text(encoding="utf-8")
    assert f"{report['perplexity']['finetuned']:,.2f}" in page
    assert report["registered"] == {
        "name": "lolcats-e2e",
        "version": "1",
        "alias": "candidate",
        "created": True,
        "uri": "models:/lolcats-e2e/1",
    }
    assert [stage["state"] for stage in report["stages"].values()] == ["ran"] * 8
    gates = report["gates"]
    assert ("challenger" in gates["aliases"]) == gates["passed"]
    assert not any(name in gates["reasons"] for name in ("loads", "recurrent", "left_padding"))
    for words in ("recall at gap 16", "code_continuation", "lolcats ui", "lolcats generate", "candidate"):
        assert words in table


def test_a_second_run_reuses_everything_and_registers_nothing_new(project: Path) -> None:
    table = succeed(project, "lolcats", "run")
    report = json.loads((project / "reports/summary.json").read_text())
    states = {name: stage["state"] for name, stage in report["stages"].items()}
    assert states.pop("inputs") == "ran"  # it hashes what lies outside the project
    assert set(states.values()) == {"unchanged"}
    assert (report["registered"]["version"], report["registered"]["created"]) == ("1", False)
    assert table.count("reused") >= 7


def test_both_exported_forms_of_the_run_write_what_its_model_writes(project: Path, tmp_path: Path) -> None:
    texts = [succeed(project, "lolcats", "generate", "def add(", "--max-new-tokens", "8")]
    for source, form in (((), "merged"), (("candidate",), "merged"), ((), "delta"), (("candidate",), "delta")):
        folder = str(tmp_path / f"{len(source)}-{form}")
        assert folder in succeed(project, "lolcats", "export", *source, "--form", form, "--to", folder)
        texts.append(succeed(project, "lolcats", "generate", "def add(", "--max-new-tokens", "8", "--model", folder))
    assert len(set(texts)) == 1, texts


def stages_run(root: Path) -> list[str]:
    """What `dvc repro` ran."""
    output = succeed(root, "dvc", "repro")
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_repro_runs_nothing_again_and_a_new_finetune_lr_runs_finetune_evaluate_and_report_alone(
    project: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project, root, symlinks=True)
    assert stages_run(root) == []
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(yaml.safe_dump(apply_overrides(yaml.safe_load(params), {"finetune.lr": 0.002})))
    assert stages_run(root) == ["finetune", "evaluate", "report"]
    assert sha256_file(root / WEIGHTS[0]) == sha256_file(project / WEIGHTS[0])
    assert sha256_file(root / WEIGHTS[1]) != sha256_file(project / WEIGHTS[1])


@pytest.mark.parametrize(("stage", "weights"), [("transfer", WEIGHTS[0]), ("finetune", WEIGHTS[1])])
def test_a_stage_killed_again_and_again_ends_bitwise_where_an_undisturbed_one_does(
    project: Path, tmp_path: Path, stage: str, weights: str
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project, root, symlinks=True)
    shutil.rmtree(root / "outputs" / stage)
    chance, kills = random.Random(stage), 0
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    while not (root / "outputs" / stage).exists():
        process = subprocess.Popen(
            [sys.executable, "-m", f"tasks.{stage}"], cwd=root, env=environment, stderr=subprocess.DEVNULL
        )
        checkpoints = list(root.glob(f".scratch/{stage}/*/checkpoint.pt"))
        before = checkpoints[0].stat().st_mtime_ns if checkpoints else 0
        # Kill soon after the next checkpoint, at a random point between it and the one after.
        while process.poll() is None and kills < 3:
            checkpoints = list(root.glob(f".scratch/{stage}/*/checkpoint.pt"))
            if checkpoints and checkpoints[0].stat().st_mtime_ns > before:
                time.sleep(chance.random() * 0.1)
                process.send_signal(chance.choice([9, 15]))
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills >= 2
    assert sha256_file(root / weights) == sha256_file(project / weights)
    assert not list(root.glob("outputs/.*.partial"))
    assert not list(processes_in(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transfer.lrr": 1}, "unknown key `transfer.lrr` (did you mean `transfer.lr`?)"),
        ({"teacher.source": "./nowhere"}, "nowhere"),
        ({"data.source": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"linearize.window_size": 3}, "`window_size` must be a power of two of at least 4 or a multiple of 64, got 3"),
        ({"finetune.target_modules": ["w"]}, "the model has no 'w'"),
        ({"evaluate.tasks": ["code_continuatoin"]}, "did you mean 'code_continuation'?"),
        ({"evaluate.recall_gaps": [300], "transfer.lr": 0.02}, "at most the teacher's context of 512 tokens, got 600"),
    ],
)
def test_broken_parameters_end_in_one_line_and_register_nothing(
    project: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project, root, symlinks=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(yaml.safe_dump(apply_overrides(params, change)))
    done = call(root, "lolcats", "run")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if message in line]
    assert lines, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (root / "outputs" / "transfer").exists() or sha256_file(root / WEIGHTS[0]) == sha256_file(
        project / WEIGHTS[0]
    )

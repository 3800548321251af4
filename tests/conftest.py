"""Shared by all tests: few threads, no network, and projects in which stages do next to nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ[_name] = _value
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "LOLCATS_ROOT", "LOLCATS_PARENT_RUN_ID", "LOLCATS_FLOW_PID"):
    os.environ.pop(_name, None)

import torch  # noqa: E402  (it reads the number of threads when it is loaded)

if not torch.cuda.is_available():
    # The fused kernels then run in Triton's interpreter; it must be asked for before any test imports them.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` exist only where there is one: deselected elsewhere, never skipped."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def _no_foreign_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's global address is put back, so that no test writes into another's store."""
    monkeypatch.delenv("LOLCATS_PARENT_RUN_ID", raising=False)
    forget_store()
    yield
    forget_store()


def forget_store() -> None:
    """Undo what `mlflow.set_tracking_uri` does to this process: it also sets the environment variable."""
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


FAKE_STAGE = """
import importlib.util, json, sys, time, types
from pathlib import Path

# The harness needs a few small modules of the library; its package would load transformers for seconds.
package = types.ModuleType("lolcats_core")
package.__path__ = importlib.util.find_spec("lolcats_core").submodule_search_locations
sys.modules["lolcats_core"] = package

from tasks.runner.stage import main

name = sys.argv.pop(1)

def pause(step):
    seconds, _, held = Path("pause.txt").read_text().partition(" ")
    time.sleep(float(seconds))
    while held and f"{name} {step}" in Path(held).read_text().splitlines():
        time.sleep(0.05)

def run(stage):
    from lolcats_common.errors import UserError
    if stage.params.seed == 13:
        raise UserError("`seed` 13 brings bad luck; take another")
    step_file = stage.scratch / "step.txt"
    step = int(step_file.read_text()) if step_file.exists() else 0
    started_at = step
    while step < 8:
        step += 1
        stage.log_metrics({"loss": 1.0 / step}, step)
        step_file.write_text(str(step))
        print(f"{name} step {step}", flush=True)
        pause(step)
    quality = Path("outputs/inputs/data.txt")
    perplexity = float(quality.read_text()) if quality.exists() else 12.0
    (stage.out / "result.txt").write_text(f"{name} {stage.params.finetune.lr if name == 'finetune' else ''}")
    if name == "teacher":
        (stage.out / "teacher.json").write_text(json.dumps({"source": "fake", "revision": "r1"}))
    if name == "finetune":
        (stage.out / "model").mkdir()
        (stage.out / "model" / "config.json").write_text(json.dumps({"lr": stage.params.finetune.lr}))
        if quality.exists():
            (stage.out / "model" / "weights.txt").write_text(str(perplexity))
    if name == "evaluate":
        measured = {"value": 0.5, "stderr": 0.1}
        (stage.out / "evaluation.json").write_text(json.dumps({
            "perplexity": {"teacher": 10.0, "swapped": 100.0, "transferred": 20.0, "finetuned": perplexity,
                "bigram": 400.0},
            "recall": {"teacher": {"128": measured}, "finetuned": {"128": measured}},
            "tasks": {"code_continuation": {"metric": "acc", "teacher": measured, "finetuned": measured, "items": 8}},
            "lm_eval_version": "0", "task_hashes": {}}))
    return {"tokens": 100, "trainable_parameters": 1, "total_parameters": 50, "started_at": started_at}

main(run, name)
"""

FAKE_DVC = """stages:
  teacher:
    cmd: python stages/fake.py teacher
    deps: [stages/fake.py]
    params: [seed, teacher]
    outs: [outputs/teacher]
  prepare:
    cmd: python stages/fake.py prepare
    deps: [outputs/teacher/teacher.json]
    params: [data]
    outs: [outputs/prepare]
  transfer:
    cmd: python stages/fake.py transfer
    deps: [outputs/prepare/result.txt]
    params: [linearize, transfer]
    outs: [outputs/transfer]
  finetune:
    cmd: python stages/fake.py finetune
    deps: [outputs/transfer/result.txt]
    params: [finetune]
    outs: [outputs/finetune]
  evaluate:
    cmd: python stages/fake.py evaluate
    deps: [outputs/finetune/model]
    params: [evaluate]
    outs: [outputs/evaluate]
"""


def run_git(root: Path, *arguments: str) -> str:
    """Git with an identity, whatever the machine has."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", *identity, "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with its tables and nothing in them; making one takes seconds."""
    from tasks.runner.mlflow_run import connect

    root = tmp_path_factory.mktemp("store")
    connect(root)
    forget_store()
    return root / "mlflow.db"


@pytest.fixture(scope="session", autouse=True)
def _prefect_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One Prefect database per test process; making one takes half a minute."""
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))


def make_fake_project(folder: Path) -> Path:
    """A git checkout with DVC whose five stages count to eight; `pause.txt` holds the seconds per step."""
    root = folder / "project"
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "fake.py").write_text(FAKE_STAGE)
    (root / "dvc.yaml").write_text(FAKE_DVC)
    (root / "pause.txt").write_text("0")
    # The fake model is no model: the gates that load it have tests of their own, with a real one.
    params = (ROOT / "params.yaml").read_text()
    (root / "params.yaml").write_text(
        re.sub(r"(?m)^  (loads|recurrent|left_padding|speed|memory): \w+", r"  \1: disabled", params)
    )
    shutil.copy(ROOT / ".gitignore", root)
    shutil.copy(ROOT / ".dvcignore", root)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    run_git(root, "init", "--quiet")
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "start")
    return root


def hold(root: Path, *steps: str) -> None:
    """Let a fake project's stages stay at these steps (``"finetune 3"``) until they are named no more.

    What happens to a stage at a step then happens there on the slowest machine too.
    """
    held = root.parent / "held.txt"
    replacement = held.with_suffix(".new")
    replacement.write_text("".join(f"{step}\n" for step in steps))
    replacement.replace(held)
    (root / "pause.txt").write_text(f"0 {held}")


@pytest.fixture
def fake_project(tmp_path: Path, empty_store: Path) -> Path:
    """`make_fake_project`, with the tables of MLflow's store made already."""
    root = make_fake_project(tmp_path)
    shutil.copy(empty_store, root / "mlflow.db")
    return root

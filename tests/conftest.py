"""Shared by all tests: few threads, no network, and projects in which stages do next to nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

# How long an example takes says nothing where other work shares the machine.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

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

ROOT = Path(__file__).parents[1]
# Programs that tests start elsewhere find `tasks` and `flows`, which no installation has under these names.
os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])

import torch  # noqa: E402  (it reads the number of threads when it is loaded)

if not torch.cuda.is_available():
    # The fused kernels then run in Triton's interpreter; it must be asked for before any test imports them.
    os.environ["TRITON_INTERPRET"] = "1"


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


# What each stage of a fake project needs besides the parameters that it reads.
FAKE_STAGES: dict[str, dict[str, Any]] = {
    "teacher": {"deps": ["stages/fake.py"], "params": ["seed", "teacher"]},
    "prepare": {"deps": ["outputs/teacher/teacher.json"], "params": ["data"]},
    "transfer": {"deps": ["outputs/prepare/result.txt"], "params": ["linearize", "transfer"]},
    "finetune": {"deps": ["outputs/transfer/result.txt"], "params": ["finetune"]},
    "evaluate": {"deps": ["outputs/finetune/model"], "params": ["evaluate"]},
}


def fake_dvc(*names: str, **changed: dict[str, Any]) -> str:
    """A dvc.yaml of the fake stages `names`; what `changed` says of a stage replaces or adds to what it has."""
    stages = {
        name: {"cmd": f"python stages/fake.py {name}", "outs": [f"outputs/{name}"]}
        | FAKE_STAGES.get(name, {})
        | changed.get(name, {})
        for name in names
    }
    return yaml.safe_dump({"stages": stages}, sort_keys=False)


def shell_stage(copy: str, source: str) -> dict[str, Any]:
    """For `fake_dvc`: a stage without Python that copies a file and names the call it ran in, as the harness does."""
    folder = Path(copy).parent
    ran = f"""printf '{{"repro": "%s"}}' "$LOLCATS_REPRO" > {folder}/run.json"""
    return {"cmd": f"echo hello && mkdir -p {folder} && cp {source} {copy} && {ran}", "deps": [source]}


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
    shutil.copy(ROOT / "tests" / "fake_stage.py", root / "stages" / "fake.py")
    (root / "dvc.yaml").write_text(fake_dvc(*FAKE_STAGES))
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

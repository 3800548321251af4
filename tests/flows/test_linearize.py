"""The flow: tasks from dvc.yaml, reuse, overrides in a worktree, and cancelling without leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from flows import delivery
from flows.linearize import stage_tasks
from tasks.runner.mlflow_run import close_abandoned, connect, experiment_id
from tests.conftest import fake_dvc, hold, run_git
from tests.tasks.processes import LAST_RESORT, processes_in, start, wait_for, wait_for_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short_project(fake_project: Path) -> Path:
    """The fake project with its first stage and the last two only."""
    short = fake_dvc("teacher", "finetune", "evaluate", finetune={"deps": ["outputs/teacher/teacher.json"]})
    (fake_project / "dvc.yaml").write_text(short)
    run_git(fake_project, "commit", "--all", "--quiet", "--message", "short")
    return fake_project


def lolcats(root: Path, *arguments: str) -> str:
    """Output of one `lolcats` call that succeeds."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cli.main", *arguments],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "reports" / "summary.json").read_text())


def states(root: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in report(root)["stages"].items()}


def all_runs(root: Path) -> list:
    client = connect(root)
    return client.search_runs([experiment_id(client)])


def test_the_flow_has_one_task_per_stage_of_dvc_yaml_in_topological_order() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    tasks = stage_tasks(ROOT)
    assert list(tasks) == [task.name for task in tasks.values()]
    assert set(tasks) == set(stages)
    order = list(tasks)
    for name, stage in stages.items():
        for dep in stage["deps"]:
            if dep.startswith("outputs/"):
                assert order.index(dep.split("/")[1]) < order.index(name)


@pytest.mark.slow
def test_only_what_changed_runs_again_and_the_model_is_registered_once(short_project: Path) -> None:
    table = lolcats(short_project, "run")
    for expected in ("perplexity, swapped, without transfer", "10x", "0.500 ± 0.100", "lolcats-demo version 1"):
        assert expected in table
    assert set(states(short_project).values()) == {"ran"}
    (parent,) = (run for run in all_runs(short_project) if run.data.tags.get("flow") == "linearize")
    children = [run for run in all_runs(short_project) if run.info.run_id != parent.info.run_id]
    assert parent.info.run_name == "linearize: 1.200x"
    assert "The teacher `builtin`" in parent.data.tags["mlflow.note.content"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    version = connect(short_project).get_model_version_by_alias("lolcats-demo", "candidate")
    assert version.tags["teacher.revision"] == "r1"
    assert {f"run.{run.info.run_name}" for run in children} <= set(version.tags)

    text = (short_project / "params.yaml").read_text()
    (short_project / "params.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    lolcats(short_project, "run")
    assert states(short_project) == {"teacher": "unchanged", "finetune": "ran", "evaluate": "ran"}
    assert report(short_project)["registered"]["version"] == "2"

    (short_project / "params.yaml").write_text(text)
    table = lolcats(short_project, "run")
    assert "Already registered, reused: lolcats-demo version 1" in table
    assert "Reused: teacher, finetune, evaluate." in table
    assert states(short_project)["finetune"] == "restored"
    assert len(connect(short_project).search_model_versions("name = 'lolcats-demo'")) == 2


@pytest.mark.slow
def test_overrides_run_in_a_worktree_and_end_as_a_dvc_experiment(short_project: Path) -> None:
    before = (short_project / "params.yaml").read_bytes()
    lolcats(short_project, "run", "--set", "finetune.lr=0.5", "--no-register")
    assert (short_project / "params.yaml").read_bytes() == before
    assert not (short_project / "outputs").exists()
    name = report(short_project)["experiment"]
    worktree = short_project / ".worktrees" / name
    assert yaml.safe_load((worktree / "params.yaml").read_text())["finetune"]["lr"] == 0.5
    assert json.loads((worktree / "outputs" / "finetune" / "model" / "config.json").read_text()) == {"lr": 0.5}
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "list", "--name-only"], cwd=short_project, capture_output=True, text=True
    )
    assert listed.stdout.split() == [name]
    names = {run.info.run_name.partition(":")[0] for run in all_runs(short_project)}
    assert names == {"linearize finetune.lr=0.5", "teacher", "finetune", "evaluate"}
    assert not (worktree / "mlflow.db").exists()

    lolcats(short_project, "run", "--set", "finetune.lr=0.5", "--no-register")
    assert set(states(short_project).values()) == {"unchanged"}
    assert [path.name for path in (short_project / ".worktrees").iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_cancelling_leaves_no_process_and_no_open_run_and_then_continues(
    short_project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    hold(short_project, "teacher 2")
    log = tmp_path / "log"
    process = start(short_project, log, "-m", "tasks.cli.main", "run", "--no-register", group=True)
    wait_for_text(log, "teacher step 2", process)
    os.killpg(process.pid, number)  # what Ctrl-C and `timeout` do
    assert process.wait(LAST_RESORT) == 128 + number
    wait_for(lambda: not list(processes_in(short_project)), "the end of every process")
    assert {run.info.status for run in all_runs(short_project)} == {"KILLED"}
    assert "Traceback" not in log.read_text()
    assert "ERROR" not in log.read_text()
    assert not (short_project / "outputs" / "teacher").exists()

    if number == signal.SIGINT:
        return  # continuing is the same after either
    hold(short_project)
    lolcats(short_project, "run", "--no-register")
    metrics = json.loads((short_project / "outputs" / "teacher" / "metrics.json").read_text())
    assert metrics["started_at"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "flow"])
def test_a_killed_flow_leaves_no_process_and_no_run_open_for_good(
    short_project: Path, tmp_path: Path, victim: str
) -> None:
    hold(short_project, "teacher 2")
    log = tmp_path / "log"
    process = start(short_project, log, "-m", "tasks.cli.main", "run", "--no-register")
    wait_for_text(log, "teacher step 2", process)
    (flow,) = psutil.Process(process.pid).children()
    (psutil.Process(process.pid) if victim == "supervisor" else flow).kill()
    process.wait(LAST_RESORT)
    wait_for(lambda: not list(processes_in(short_project)), "the end of every process")
    close_abandoned(short_project, "linearize")
    assert {run.info.status for run in all_runs(short_project)} == {"KILLED"}


@pytest.mark.slow
def test_a_failing_stage_ends_the_flow_with_one_line_and_registers_nothing(short_project: Path, tmp_path: Path) -> None:
    text = (short_project / "params.yaml").read_text()
    (short_project / "params.yaml").write_text(text.replace("seed: 0", "seed: 13"))
    log = tmp_path / "log"
    assert start(short_project, log, "-m", "tasks.cli.main", "run").wait(LAST_RESORT) == 1
    assert log.read_text().strip().splitlines()[-1] == "Error: teacher: `seed` 13 brings bad luck; take another"
    assert "Traceback" not in log.read_text()
    assert {run.info.status for run in all_runs(short_project)} == {"FAILED"}
    assert connect(short_project).search_registered_models() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.tasks=[code_continuatoin]", "did you mean 'code_continuation'?"),
        ("finetune.target_modules=[w]", "the model has no 'w'"),
        ("teacher.source=./encoder", "architecture 'bert' cannot be linearized"),
    ],
)
def test_what_this_machine_can_tell_to_be_wrong_leaves_no_run_and_no_worktree(
    short_project: Path, tmp_path: Path, override: str, said: str
) -> None:
    (short_project / "encoder").mkdir()
    (short_project / "encoder" / "config.json").write_text('{"model_type": "bert"}')
    (short_project / "mlflow.db").unlink()
    log = tmp_path / "log"
    assert start(short_project, log, "-m", "tasks.cli.main", "run", "--set", override).wait(LAST_RESORT) == 1
    *_, line = log.read_text().strip().splitlines()
    assert line.startswith("Error: ")
    assert said in line
    assert not (short_project / "mlflow.db").exists()
    assert not (short_project / ".worktrees").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MLFLOW_TRACKING_URI", "http://127.0.0.1:1"), ("PREFECT_API_URL", "http://127.0.0.1:1/api")],
)
def test_a_server_that_is_down_is_said_with_advice_before_the_flow_begins(
    short_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    log = tmp_path / "log"
    assert start(short_project, log, "-m", "tasks.cli.main", "run", "--set", "seed=1").wait(LAST_RESORT) == 1
    *_, line = log.read_text().strip().splitlines()
    assert f"at {value} does not answer (Connection refused); start it (`make serve`), correct {variable}" in line
    assert not (short_project / ".worktrees").exists()


def test_a_page_that_prefect_does_not_take_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(delivery, "create_markdown_artifact", refuse)
    delivery.show("# page", "summary", "a page")
    assert "did not take the page 'summary': connection refused" in caplog.text


@pytest.mark.parametrize(
    "task", [delivery.register_model, delivery.run_gates, delivery.promote_version, delivery.roll_back]
)
def test_what_needs_mlflow_is_tried_again_for_longer_than_a_server_needs_to_come_back(task: Any) -> None:
    """Whatever MLflow's own client waits for, which is next to nothing where it is told so."""
    assert task.retries == len(task.retry_delay_seconds)
    assert sum(task.retry_delay_seconds) * (1 - task.retry_jitter_factor) >= 180
    assert max(task.retry_delay_seconds) <= 30  # nor does it go on long after the server is back

"""The stage harness: atomic outputs, resume after a kill, one line for the user, one MLflow run."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError

from lolcats_common.errors import UserError
from lolcats_common.params import load_params
from tasks.runner import processes
from tasks.runner.exits import Terminated
from tasks.runner.mlflow_run import connect
from tasks.runner.stage import STATE, Stage, execute, scratch_key
from tests.conftest import fake_dvc, hold
from tests.tasks.processes import LAST_RESORT, start, wait_for_text

Run = Callable[[Stage], Mapping[str, float]]


def runs(root: Path) -> list:
    return connect(root).search_runs(["1"])


def scratch(root: Path, name: str) -> Path:
    return root / ".scratch" / name / scratch_key(name, root, load_params(root / "params.yaml"))


def succeed(stage: Stage) -> Mapping[str, float]:
    (stage.out / "result.txt").write_text("done")
    stage.log_metrics({"loss": 0.5}, step=1)
    return {"tokens": 7}


def test_outputs_metrics_and_run_appear_together_and_the_scratch_goes(fake_project: Path) -> None:
    assert execute("teacher", fake_project, succeed) == 0
    out = fake_project / "outputs" / "teacher"
    metrics, run = (json.loads((out / name).read_text()) for name in ("metrics.json", "run.json"))
    assert metrics["tokens"] == 7
    assert metrics["stage_seconds"] >= 0
    (tracked,) = runs(fake_project)
    assert (tracked.info.run_id, tracked.info.status) == (run["run_id"], "FINISHED")
    assert tracked.data.params["finetune.lr"] == "0.001"
    assert tracked.data.metrics["loss"] == 0.5
    assert not (fake_project / ".scratch" / "teacher").exists()


def interrupted(stage: Stage) -> Mapping[str, float]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (UserError("`x` must be 1,\n got 2"), 1, "FAILED"),
        (PermissionError(errno.EACCES, "Permission denied", "rows.bin"), 1, "FAILED"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "FAILED"),
        (SafetensorError("I/O error: Too many open files (os error 24)"), 1, "FAILED"),
        (MemoryError(), 1, "FAILED"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "FAILED"),
        (Terminated(), 143, "KILLED"),
        (KeyboardInterrupt(), 130, "KILLED"),
    ],
)
def test_a_stage_that_does_not_end_well_leaves_no_output_and_keeps_its_scratch(
    fake_project: Path, error: BaseException, code: int, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(stage: Stage) -> Mapping[str, float]:
        (stage.out / "half").write_text("half")
        (stage.scratch / "checkpoint").write_text("3")
        raise error

    assert execute("teacher", fake_project, fail) == code
    assert list((fake_project / "outputs").iterdir()) == []
    assert (scratch(fake_project, "teacher") / "checkpoint").read_text() == "3"
    assert [run.info.status for run in runs(fake_project)] == [status]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "Traceback" not in lines[0]

    assert execute("teacher", fake_project, succeed) == 0
    (resumed,) = runs(fake_project)
    assert resumed.info.status == "FINISHED"


def test_a_defect_keeps_its_traceback_and_fails_the_run(fake_project: Path) -> None:
    def broken(stage: Stage) -> Mapping[str, float]:
        raise ZeroDivisionError("defect")

    with pytest.raises(ZeroDivisionError):
        execute("teacher", fake_project, broken)
    assert [run.info.status for run in runs(fake_project)] == ["FAILED"]


def test_a_second_process_of_a_stage_says_that_one_runs_and_touches_nothing(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "LOCK_SECONDS", 0.1)

    def meanwhile(stage: Stage) -> Mapping[str, float]:
        (stage.out / "result.txt").write_text("first")
        with ThreadPoolExecutor(1) as other:  # a lock of its own, as another process has
            assert other.submit(execute, "teacher", fake_project, succeed).result() == 1
        return {}

    assert execute("teacher", fake_project, meanwhile) == 0
    assert "teacher: this stage already runs" in capsys.readouterr().err
    assert (fake_project / "outputs" / "teacher" / "result.txt").read_text() == "first"
    assert execute("teacher", fake_project, succeed) == 0
    assert [run.info.status for run in runs(fake_project)] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"run_id": 1}', b"\xff\xfe", b'{"run_id": "gone", "seconds": 1}']
)
def test_damaged_resume_state_is_replaced(fake_project: Path, content: bytes) -> None:
    directory = scratch(fake_project, "teacher")
    directory.mkdir(parents=True)
    (directory / STATE).write_bytes(content)
    assert execute("teacher", fake_project, succeed) == 0
    assert [run.info.status for run in runs(fake_project)] == ["FINISHED"]


def test_a_run_is_not_begun_anew_because_the_store_does_not_answer(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute("teacher", fake_project, interrupted) == 130
    with monkeypatch.context() as patch:

        def fail(*arguments: object) -> None:
            raise MlflowException("HTTP 503: try again later")

        patch.setattr(MlflowClient, "get_run", fail)
        assert execute("teacher", fake_project, succeed) == 1
        assert "cannot be written: HTTP 503" in capsys.readouterr().err
    assert execute("teacher", fake_project, succeed) == 0
    assert [run.info.status for run in runs(fake_project)] == ["FINISHED"]


def test_a_metric_that_is_not_finite_fails_the_stage(fake_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("teacher", fake_project, lambda stage: {"loss": float("nan")}) == 1
    assert "`loss` is nan" in capsys.readouterr().err
    assert not (fake_project / "outputs" / "teacher").exists()


def test_a_missing_input_names_the_command(fake_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reader(stage: Stage) -> Mapping[str, float]:
        stage.input("prepare")
        return {}

    assert execute("teacher", fake_project, reader) == 1
    assert "outputs/prepare is missing" in capsys.readouterr().err


def test_the_scratch_follows_exactly_what_the_stage_depends_on(fake_project: Path) -> None:
    params = load_params(fake_project / "params.yaml")
    key = scratch_key("teacher", fake_project, params)
    other_lr = replace(params, finetune=replace(params.finetune, lr=0.5))
    assert scratch_key("teacher", fake_project, other_lr) == key
    assert scratch_key("teacher", fake_project, replace(params, seed=5)) != key
    (fake_project / "stages" / "fake.py").write_text("changed")
    assert scratch_key("teacher", fake_project, params) != key


def test_unknown_stages_and_parameters_in_dvc_yaml_are_named(fake_project: Path) -> None:
    params = load_params(fake_project / "params.yaml")
    with pytest.raises(UserError, match="no stage 'nothing'"):
        scratch_key("nothing", fake_project, params)
    (fake_project / "dvc.yaml").write_text(fake_dvc("teacher", teacher={"params": ["transfer.rate"]}))
    with pytest.raises(UserError, match=r"`transfer\.rate`"):
        scratch_key("teacher", fake_project, params)


def test_a_store_of_files_is_refused_in_one_line(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    assert execute("teacher", fake_project, succeed) == 1
    assert "sqlite:///mlflow.db" in capsys.readouterr().err


def test_a_damaged_store_is_told_in_one_line(fake_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fake_project / "mlflow.db").write_bytes(b"not a database at all" * 100)
    assert execute("teacher", fake_project, succeed) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_store_that_takes_no_run_is_told_in_one_line(fake_project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(fake_project / "mlflow.db")) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'it takes none'); END")
    assert execute("teacher", fake_project, succeed) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "it takes none" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_continues_in_the_same_run(fake_project: Path, tmp_path: Path, number: signal.Signals) -> None:
    hold(fake_project, "teacher 3")
    log = tmp_path / "log"
    process = start(fake_project, log, "stages/fake.py", "teacher")
    wait_for_text(log, "step 3", process)
    process.send_signal(number)
    assert process.wait(LAST_RESORT) == (143 if number == signal.SIGTERM else -9)
    assert not (fake_project / "outputs" / "teacher").exists()
    (run,) = runs(fake_project)
    assert run.info.status == ("KILLED" if number == signal.SIGTERM else "RUNNING")

    hold(fake_project)
    assert start(fake_project, log, "stages/fake.py", "teacher").wait(LAST_RESORT) == 0
    metrics = json.loads((fake_project / "outputs" / "teacher" / "metrics.json").read_text())
    assert metrics["started_at"] >= 3
    (run,) = runs(fake_project)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in connect(fake_project).get_metric_history(run.info.run_id, "loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 8

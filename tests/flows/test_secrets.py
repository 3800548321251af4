"""No secret of the environment is in a store, a log, an error file or a list of processes, whatever a stage does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import fake_dvc, hold, run_git
from tests.tasks.processes import LAST_RESORT, start, wait_for

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDtoken",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/aws+key",
    "LOLCATS_WEBHOOK_URL": "http://127.0.0.1:9/services/PLANTEDhook",
    "PGPASSWORD": "PLANTEDpostgres",
}
# A stage that tells everything it knows, everywhere it can; with seed 14 it then dies of it.
LEAK = """

def leak(stage: Stage) -> None:
    import os

    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "LOLCATS_WEBHOOK_URL", "PGPASSWORD", "PLANTED_DATABASE")
    secret = " ".join(os.environ[name] for name in names)
    print(secret, flush=True)
    stage.log_text("page.txt", secret)
    stage.log_dataset(secret[:200], secret, "0", "training")
    stage._run.set_tags({"secret": secret})
    if stage.params.seed == 14:
        raise RuntimeError(secret)


"""


def tells(content: bytes) -> bool:
    return b"PLANTED" in content.replace(b"PLANTED_DATABASE", b"")


@pytest.fixture
def leaking(fake_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two stages, the second of which leaks."""
    source = fake_project / "stages" / "fake.py"
    text = source.read_text().replace("\ndef pause(", LEAK + "def pause(")
    source.write_text(text.replace("    write_outputs(stage)\n", "    leak(stage)\n    write_outputs(stage)\n", 1))
    (fake_project / "dvc.yaml").write_text(
        fake_dvc("teacher", "finetune", "evaluate", finetune={"deps": ["outputs/teacher/teacher.json"]})
    )
    run_git(fake_project, "commit", "--all", "--quiet", "--message", "it leaks")
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PLANTED_DATABASE", "postgresql://bob:PLANTEDdatabase@127.0.0.1/db")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "INFO")
    return fake_project


@pytest.mark.slow
def test_a_run_leaves_no_secret_anywhere_and_shows_none_to_ps(
    leaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, failed, refused = tmp_path / "log", tmp_path / "failed", tmp_path / "refused"
    hold(leaking, "teacher 2")
    run = start(leaking, log, "-m", "tasks.cli.main", "run", "--set", "seed=1")
    wait_for(
        lambda: list(leaking.glob(".worktrees/*/.scratch/teacher/*/step.txt")), "a stage", lambda: _ended(run, log)
    )
    processes = psutil.Process(run.pid).children(recursive=True)
    assert len(processes) >= 3  # flow, DVC, stage
    shown = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in processes]
    assert not [line for line in shown if tells(line)]
    hold(leaking)
    assert run.wait(LAST_RESORT) == 0, log.read_text()
    assert start(leaking, failed, "-m", "tasks.cli.main", "run", "--set", "seed=14").wait(LAST_RESORT) == 1
    assert "RuntimeError: ***" in failed.read_text()
    for section in ("data", "teacher"):
        given = f"{section}.source=https://bob:PLANTEDurl@host/x"
        assert start(leaking, refused, "-m", "tasks.cli.main", "run", "--set", given).wait(LAST_RESORT) == 1
        assert "must hold no login, which belongs in the environment, got 'https://***@host/x'" in refused.read_text()
        assert len(refused.read_text().splitlines()) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:PLANTEDlogin@127.0.0.1:9")
    assert start(leaking, refused, "-m", "tasks.cli.main", "run", "--set", "seed=3").wait(LAST_RESORT) == 1
    assert "MLflow at http://127.0.0.1:9 does not answer" in refused.read_text()
    searched = 0
    for file in tmp_path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert not tells(file.read_bytes()), file
            searched += 1
    assert searched > 100
    objects = ["git", "-C", str(leaking), "cat-file", "--batch-all-objects", "--batch"]
    told = subprocess.run(objects, capture_output=True, check=True).stdout
    assert b"seed: 1\n" in told  # what the experiment kept
    assert not tells(told)


def _ended(process: subprocess.Popen[bytes], log: Path) -> str:
    return "" if process.poll() is None else log.read_text(errors="replace")[-4000:]

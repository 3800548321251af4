"""A local MLflow store is made once and whole, however many processes begin with it and wherever one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Ends the process at the n-th change of the tables, if n is above 0.
CONNECT = """
import os, signal, sys
from pathlib import Path
from alembic.operations import Operations
from tasks.runner.mlflow_run import connect, experiment_id

left = int(sys.argv[2])
invoke = Operations.invoke

def counted(self, operation):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return invoke(self, operation)

Operations.invoke = counted
print(experiment_id(connect(Path(sys.argv[1]))))
"""


def start(root: Path, dies_at: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONNECT, str(root), str(dies_at)]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_process_and_three_at_once_leave_one_whole_store(tmp_path: Path) -> None:
    assert start(tmp_path, dies_at=40).wait() == -9
    assert not (tmp_path / "mlflow.db").exists()
    together = [start(tmp_path) for _ in range(3)]
    answers = [process.communicate() for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], answers
    assert len({said for said, _ in answers}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]

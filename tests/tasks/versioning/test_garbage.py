"""`gc` lists what nothing points at, removes it only when told to, and keeps what a version points at."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lolcats_common.errors import UserError
from tasks.runner.mlflow_run import connect, experiment_id
from tasks.versioning import dvc_graph, lock_commits
from tasks.versioning.garbage import collect
from tests.conftest import run_git

DVC = """stages:
  only:
    cmd: mkdir -p outputs/only && cp source.txt outputs/only/x
    deps: [source.txt]
    outs: [outputs/only]
"""


@pytest.fixture
def project(fake_project: Path) -> Path:
    """A project with one stage without Python, committed."""
    (fake_project / "dvc.yaml").write_text(DVC)
    (fake_project / "source.txt").write_text("start")
    run_git(fake_project, "add", "--all")
    run_git(fake_project, "commit", "--quiet", "--message", "one stage")
    return fake_project


def make(root: Path, content: str) -> None:
    (root / "source.txt").write_text(content)
    dvc_graph.repro("only", root, on_line=lambda line: None)


@pytest.mark.slow
def test_only_what_nothing_points_at_is_removed_and_a_version_s_bytes_come_back(project: Path, tmp_path: Path) -> None:
    make(project, "kept")
    commit = lock_commits.keep_lock(project, "refs/tags/lolcats/m/1")
    make(project, "lost")
    make(project, "now")
    client = connect(project)
    model = client.create_logged_model(experiment_id(client), name="left")
    assert collect(project).models == ()  # it is young: its registration may still run

    listed = collect(project, older_than=-60.0)
    assert (len(listed.objects), listed.models) == (2, (model.model_id,))
    assert collect(project, older_than=-60.0) == listed
    assert collect(project, delete=True, older_than=-60.0) == listed
    left = collect(project, older_than=-60.0)
    assert (left.objects, left.models) == ((), ())

    command = [sys.executable, "-m", "dvc", "get", str(project), "outputs", "--rev", str(commit)]
    subprocess.run([*command, "--out", str(tmp_path / "back")], check=True, capture_output=True)
    assert (tmp_path / "back" / "only" / "x").read_text() == "kept"


def test_a_model_that_says_it_lies_elsewhere_has_nothing_there_removed(project: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "artifacts").mkdir(parents=True)
    (precious / "file").write_text("mine")
    client = connect(project)
    model = client.create_logged_model(experiment_id(client), name="left")
    with sqlite3.connect(project / "mlflow.db") as store:
        place = f"file://{precious}/artifacts"
        store.execute("UPDATE logged_models SET artifact_location = ? WHERE model_id = ?", (place, model.model_id))
    collect(project, delete=True, older_than=-60.0)
    assert (precious / "file").read_text() == "mine"


def test_nothing_is_collected_while_a_stage_runs(project: Path) -> None:
    lock = project / ".dvc" / "tmp" / "rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text('{"outputs/only": {"write": {"pid": 1, "cmd": "dvc repro"}}}')
    with pytest.raises(UserError, match="a stage runs in"):
        collect(project)


def test_the_empty_entries_that_dvc_leaves_in_its_lock_file_stop_nothing(project: Path) -> None:
    lock = project / ".dvc" / "tmp" / "rwlock"
    lock.parent.mkdir(exist_ok=True)
    for left in ('{"write": {}}', '{"outputs/only": {"write": {}, "read": []}}', "{}", ""):
        lock.write_text(left)
        assert collect(project).objects == ()

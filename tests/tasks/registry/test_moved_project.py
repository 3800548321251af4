"""A project that was moved or copied has its own registry, and leaves the original's alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import load_params
from tasks.registry.register import register
from tasks.registry.versions import version_files
from tasks.runner.mlflow_run import Run, connect
from tasks.versioning import dvc_graph, garbage
from tests.conftest import forget_store
from tests.tasks.conftest import set_model

NAME = "lolcats-demo"


def files_in(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in (root / "mlartifacts").rglob("*")}


@pytest.fixture
def registered(finished: Path) -> Path:
    """A project with one version and one run that has an artifact."""
    register(finished, load_params(finished / "params.yaml"))
    run = Run.start(finished, "linearize")
    run.log_text("page", "summary.md")
    run.finish()
    forget_store()
    return finished


def use(root: Path) -> None:
    """Read a version and write another and a run, all of which must lie in the project."""
    _, files = version_files(root, NAME, "candidate")
    assert files.is_relative_to(root)
    assert (files / "model" / "config.json").is_file()
    set_model(root, "m2")
    assert register(root, load_params(root / "params.yaml")).version == "2"
    run = Run.start(root, "linearize")
    run.log_text("new", "new.md")
    run.finish()
    assert {path.name for path in files_in(root)} >= {"summary.md", "new.md"}
    assert version_files(root, NAME, "2")[1].is_relative_to(root)


def test_a_moved_project_reads_and_writes_where_it_is_now(registered: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a b ü [x]" / "project"
    moved.parent.mkdir()
    registered.rename(moved)
    use(moved)
    assert not registered.exists()


def test_a_copy_shares_nothing_with_the_original(
    registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(registered, copy, symlinks=True)
    before = files_in(registered)
    use(copy)
    client = connect(copy)
    for number in ("1", "2"):
        client.delete_model_version(NAME, number)
    monkeypatch.setattr(dvc_graph, "run_dvc", lambda *arguments, **options: "")  # its dvc.lock names no real output
    assert len(garbage.collect(copy, delete=True, older_than=0).models) == 2
    assert files_in(registered) == before
    forget_store()
    shutil.rmtree(copy)
    assert (version_files(registered, NAME, "candidate")[1] / "model" / "config.json").is_file()


def test_artifacts_that_were_not_copied_stay_where_they_are(registered: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(registered / "mlflow.db", bare)
    connect(bare)
    _, files = version_files(bare, NAME, "candidate")
    assert files.is_relative_to(registered)


def test_files_that_are_gone_are_named_and_not_the_version(registered: Path) -> None:
    shutil.rmtree(registered / "mlartifacts")
    with pytest.raises(UserError, match="the files of lolcats-demo version 1 are missing from the store"):
        version_files(registered, NAME, "candidate")

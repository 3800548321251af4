"""Git is asked about the project, wherever the program was started from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.runner.git import git, git_state
from tests.conftest import run_git


def repository(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text(folder.name)
    run_git(folder, "init", "--quiet")
    run_git(folder, "add", "--all")
    run_git(folder, "commit", "--quiet", "-m", "start")
    return folder


def test_in_a_hook_of_another_repository_the_project_s_own_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, other = repository(tmp_path / "project"), repository(tmp_path / "other")
    before, index = git_state(project), (other / ".git" / "index").read_bytes()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert git_state(project) == before
    (project / "new").write_text("")
    git(project, "add", "new")
    assert (other / ".git" / "index").read_bytes() == index
    own = {"GIT_INDEX_FILE": str(project / ".git" / "mine")}
    git(project, "add", "file", env=own)  # what a caller asks for stands
    assert (project / ".git" / "mine").is_file()

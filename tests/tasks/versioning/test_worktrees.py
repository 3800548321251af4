"""Worktrees of runs with overrides, and when a checkout counts as changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tasks.runner.mlflow_run import git_state
from tasks.versioning.worktrees import prepare
from tests.conftest import make_fake_project, run_git


def test_a_worktree_of_a_copied_project_is_not_the_original_s(fake_project: Path, tmp_path: Path) -> None:
    (fake_project / "kernels").mkdir()
    first = prepare(fake_project, None, {"seed": 1})
    copy = tmp_path / "copy"
    shutil.copytree(fake_project, copy, symlinks=True)
    second = prepare(copy, None, {"seed": 1})
    assert second.root == copy / ".worktrees" / str(first.name)
    for worktree, project in ((first, fake_project), (second, copy)):
        assert Path(run_git(worktree.root, "rev-parse", "--git-common-dir").strip()) == project / ".git"
    assert (second.root / ".scratch" / "imports" / "lolcats_kernels").readlink() == second.root / "kernels"
    cached = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"], cwd=second.root, capture_output=True, text=True
    )
    assert (second.root / cached.stdout.strip()).resolve() == copy / ".dvc" / "cache"


def test_overrides_work_and_share_dvc_s_settings_in_a_folder_of_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "mein Projekt ü"
    folder.mkdir()
    project = make_fake_project(folder)
    (project / ".dvc" / "config.local").write_text(
        f"""['remote "near"']\n    url = ../../störage\n['remote "far"']\n    url = {tmp_path}/ö\n    profile = p\n"""
        """['remote "s3"']\n    url = s3://bucket/ä\n""",
        encoding="utf-8",
    )
    worktree = prepare(project, None, {"seed": 1}).root
    assert prepare(project, None, {"seed": 1}).root == worktree
    dvc = [sys.executable, "-m", "dvc"]
    shown = subprocess.run([*dvc, "cache", "dir"], cwd=worktree, capture_output=True, text=True, check=True)
    assert (worktree / shown.stdout.strip()).resolve() == project / ".dvc" / "cache"
    listed = subprocess.run([*dvc, "remote", "list"], cwd=worktree, capture_output=True, text=True, check=True)
    remotes = " ".join(listed.stdout.split())
    for expected in (f"near {folder}/störage", f"far {tmp_path}/ö", "s3 s3://bucket/ä"):
        assert expected in remotes


def test_parameters_do_not_make_a_checkout_dirty_since_the_run_s_commit_keeps_them(fake_project: Path) -> None:
    with (fake_project / "params.yaml").open("a") as file:
        file.write("# other\n")
    assert git_state(fake_project)[1] is False
    assert git_state(fake_project, besides=())[1] is True
    (fake_project / "stages" / "fake.py").write_text("")
    assert git_state(fake_project)[1] is True

"""What `make` does before it starts anything: which virtual environment it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("Makefile", "pyproject.toml", "constraints.txt")


def plan(folder: Path) -> str:
    """The commands of `make setup`, which are not run."""
    done = subprocess.run(["make", "-n", "setup"], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A project whose virtual environment was made where it is; its programs name their Python."""
    project = tmp_path / "a project"
    project.mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / name, project)
    programs = project / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "lolcats").write_text(f"#!{programs}/python\n")
    (project / ".venv" / ".installed").touch()
    for name in NEEDED:
        os.utime(project / name, (0, 0))
    return project


def test_a_virtual_environment_is_made_once(installed: Path) -> None:
    assert "pip install" not in plan(installed)


def test_a_virtual_environment_of_another_place_is_made_anew(installed: Path) -> None:
    copy = installed.with_name("copy")
    shutil.copytree(installed, copy)
    assert "pip install" in plan(copy)
    moved = installed.rename(installed.with_name("moved"))
    assert "pip install" in plan(moved)

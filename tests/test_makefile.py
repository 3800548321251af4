"""What `make` does before it starts anything: which virtual environment it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("Makefile", "pyproject.toml", "constraints.txt")


def plan(folder: Path, *variables: str) -> str:
    """The commands of `make setup`, which are not run."""
    command = ["make", "-n", "setup", *variables]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def python(folder: Path, version: tuple[int, int]) -> Path:
    """A program that says it is a Python of this version."""
    program = folder / f"python{version[0]}.{version[1]}"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    return program


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
    (programs / "python").symlink_to(sys.executable)
    (project / ".venv" / ".installed").touch()
    for name in NEEDED:
        os.utime(project / name, (0, 0))
    return project


def test_a_virtual_environment_is_made_once(installed: Path) -> None:
    assert "pip install" not in plan(installed)


def test_a_python_that_is_asked_for_is_taken_and_not_the_one_that_is_there(installed: Path, tmp_path: Path) -> None:
    this = sys.version_info[:2]
    assert "pip install" not in plan(installed, f"PYTHON={python(tmp_path, this)}")
    assert "pip install" in plan(installed, f"PYTHON={python(tmp_path, (3, this[1] + 1))}")


def test_the_pythons_that_are_declared_are_those_that_make_and_the_readme_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [entry.rpartition(" ")[2] for entry in project["classifiers"]]
    assert project["requires-python"] == f">={declared[0]},<3.{int(declared[-1].partition('.')[2]) + 1}"
    named = f"Python {', '.join(declared[:-1])} or {declared[-1]}"
    for file in ("Makefile", "README.md"):
        assert named in (ROOT / file).read_text(encoding="utf-8")
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in declared


def test_a_virtual_environment_of_another_place_is_made_anew(installed: Path) -> None:
    copy = installed.with_name("copy")
    shutil.copytree(installed, copy)
    assert "pip install" in plan(copy)
    moved = installed.rename(installed.with_name("moved"))
    assert "pip install" in plan(moved)

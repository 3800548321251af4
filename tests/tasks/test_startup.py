"""What a person waits for first, help and a refused params.yaml, comes without the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = [path.stem for path in sorted((ROOT / "tasks").glob("*.py")) if path.stem != "__init__"]
HEAVY = {"torch", "transformers", "mlflow", "prefect", "pandas", "datasets", "lm_eval", "matplotlib"}
# Python with `-X importtime` writes a line for each module that is imported, the program's own children included.
COMMANDS = ["run", "status", "chat", "export", "register", "gates", "compare", "ablate", "doctor", "plan"]


def heavy_imports(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 50, done.stderr
    return {line.rpartition("|")[2].strip() for line in lines} & HEAVY


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_answers_help_and_refuses_params_without_what_it_computes_with(fake_project: Path, name: str) -> None:
    (fake_project / "params.yaml").write_text("sed: 0\n")
    answered = python(fake_project, f"tasks.{name}", "--help")
    assert answered.returncode == 0
    assert f"python -m tasks.{name}" in answered.stdout
    refused = python(fake_project, f"tasks.{name}")
    assert refused.returncode == 1
    assert f"{name}: params.yaml" in refused.stderr or f"{name}: {fake_project}/params.yaml" in refused.stderr
    assert (fake_project / ".scratch" / name / "error.txt").is_file()
    assert heavy_imports(answered) | heavy_imports(refused) == set()


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), ["status"]])
def test_the_program_answers_without_the_heavy_libraries(fake_project: Path, arguments: list[str]) -> None:
    done = python(fake_project, "tasks.cli.main", *arguments)
    assert done.returncode == 0, done.stderr
    assert heavy_imports(done) == set()


@pytest.mark.parametrize("command", ["run", "doctor", "ablate"])
def test_wrong_overrides_are_refused_without_the_heavy_libraries(fake_project: Path, command: str) -> None:
    done = python(fake_project, "tasks.cli.main", command, "--set", "seed=x")
    assert done.returncode == 1
    assert "`seed` must be a whole number" in done.stderr
    assert heavy_imports(done) == set()

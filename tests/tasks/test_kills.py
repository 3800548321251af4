"""Killed at a line of its own work, every stage and every step of the registry ends as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_is_killed_inside_its_work_ends_in_the_bytes_of_an_undisturbed_run() -> None:
    # A process of its own: it forks each run, which one with the threads of a test runner should not do.
    command = [sys.executable, "-m", "tests.tasks.kills", "--kills", "10", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["differing"] == 0
    assert len(counts["by command"]) == 10

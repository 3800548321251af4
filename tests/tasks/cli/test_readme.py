"""The commands that the README shows after the demo work on what a run leaves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lolcats_common.params import load_params
from tasks.cli.main import app
from tasks.registry.register import register

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
AFTER_THE_DEMO = re.findall(r"(?m)^\.venv/bin/lolcats (.+)$", README.partition("## Your own model")[0])


def test_the_commands_after_the_demo_work_on_what_it_leaves(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert {command.split()[0] for command in AFTER_THE_DEMO} == {"generate", "chat", "export"}
    register(finished, load_params(finished / "params.yaml"))
    for command in AFTER_THE_DEMO:
        result = CliRunner().invoke(app, shlex.split(command, comments=True), input="def f():\n/exit\n")
        assert result.exit_code == 0, (command, result.output)
    assert (finished / "demo-model" / "config.json").is_file()


def test_a_version_that_does_not_exist_is_answered_with_those_that_do(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    register(finished, load_params(finished / "params.yaml"))
    result = CliRunner().invoke(app, ["generate", "x", "--model", "mine@candidate"])
    assert result.exit_code == 1
    said = "mine@candidate: no such directory or registered version; lolcats-demo@candidate is version 1"
    assert result.stderr.strip() == f"Error: {said}"

"""The program `lolcats`: quick help, and one line and exit code 1 for whatever a person can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tasks.cli.main import app
from tasks.cli.reasons import short
from tasks.runner.store import read_overview
from tasks.versioning.dvc_graph import run_dvc

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(fake_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is the fake project."""
    monkeypatch.chdir(fake_project)
    (fake_project / "mlflow.db").unlink()
    return fake_project


def refused(*arguments: str) -> str:
    """The single line of an invocation that must fail with exit code 1."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tasks.cli.main", "--help"], capture_output=True, text=True, cwd=ROOT)
    for command in (
        "run",
        "status",
        "generate",
        "chat",
        "register",
        "export",
        "compare",
        "ablate",
        "frontier",
        "doctor",
        "plan",
        "gates",
        "promote",
        "rollback",
        "lineage",
        "gc",
        "teacher",
    ):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "finetune.lrr=0.1"], "`finetune.lrr` (did you mean `finetune.lr`?)"),
        (["--set", "finetun.lr=0.1"], "`finetun` (did you mean `finetune`?)"),
        (["--set", "finetune.lr=quick"], "`finetune.lr` must be a finite number"),
        (["--set", "finetune.lr=-1"], "`lr` must be greater than 0"),
        (["--set", "finetune.lr=.nan"], "`finetune.lr` must be a finite number"),
        (["--set", "finetune.lr"], "KEY=VALUE"),
        (["--set", "finetune.lr=[1"], "not valid YAML"),
        (["--preset", "llama9"], "unknown preset 'llama9'"),
    ],
)
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_wrong_overrides_are_refused_before_anything_runs(
    here: Path, command: str, arguments: list[str], said: str
) -> None:
    assert said in refused(command, *arguments)
    assert not (here / "mlflow.db").exists()
    assert not (here / ".worktrees").exists()
    assert not (here / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.source=./nowhere", "no such directory, and not a Hugging Face id"),
        (
            "teacher.source=gpt2",
            "no such directory; of the Hugging Face model gpt2, `teacher.revision` must be a commit",
        ),
        ("teacher.source=models/mine", "teacher models/mine: no such directory; of the Hugging Face model"),
        ("teacher.source=builtn", "did you mean `builtin`?"),
        ("teacher.source=stages", "config.json is missing"),
        ("teacher.source=params.yaml", "is a file"),
        ("teacher.source=models/mine.gguf", "teacher models/mine.gguf: no such file"),
        ("data.source=./nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("data.source=texts.jsonl", "texts.jsonl does not exist"),
        ("data.source=texts/*.jsonl", "project/texts/*.jsonl"),
        ("data.source=squad", "squad does not exist, and is no Hugging Face dataset id (owner/name)"),
        ("data.source=some/squad", "of the Hugging Face dataset some/squad, `data.revision` must be a commit"),
    ],
)
@pytest.mark.parametrize("command", ["run", "ablate", "frontier"])
def test_a_teacher_or_text_that_is_not_there_is_refused_before_anything_runs(
    here: Path, command: str, override: str, said: str
) -> None:
    assert said in refused(command, "--set", override)
    assert not (here / "mlflow.db").exists()
    assert not (here / ".worktrees").exists()
    assert not (here / ".scratch").exists()


@pytest.mark.parametrize("override", ["transfer.learning_rate=1", "teacher.source=gpt2", "data.source=./nowhere"])
def test_what_is_wrong_is_refused_without_a_large_import(here: Path, override: str) -> None:
    program = (
        "import sys\n"
        "from tasks.cli.main import app\n"
        "try:\n    app()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'mlflow', 'prefect', 'pandas'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "run", "--set", override]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (1, "[]\n"), done.stderr


@pytest.mark.parametrize("content", [b"", b"seed: [", b"\xff\xfe\x00", b"- 1\n", b"sed: 0\n", b"seed: nan\n"])
def test_a_broken_params_yaml_is_refused_in_one_line(here: Path, content: bytes) -> None:
    (here / "params.yaml").write_bytes(content)
    assert "params.yaml" in refused("run")
    assert not (here / "mlflow.db").exists()


def test_outside_a_project_every_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ["run"],
        ["status"],
        ["register"],
        ["serve"],
        ["generate", "x"],
        ["generate", "x", "--model", "candidate"],
        ["chat"],
        ["export"],
        ["promote"],
        ["gc"],
    ):
        assert "is not in a project" in refused(*command)


def test_what_a_run_needs_is_said_outside_a_project_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["plan", "--preset", "llama3_1_8b"], ["doctor"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "transfer" in result.output
    assert list(tmp_path.iterdir()) == []


def test_generating_without_a_model_says_what_to_do(here: Path) -> None:
    assert "run `lolcats run` first" in refused("generate", "x")
    assert "registered version" in refused("generate", "x", "--model", "candidate")
    (here / "empty").mkdir()
    assert "no config.json or delta.json" in refused("generate", "x", "--model", "empty")


def test_a_damaged_model_is_one_line(here: Path) -> None:
    (here / "damaged").mkdir()
    (here / "damaged" / "config.json").write_text("{")
    assert "does not load" in refused("generate", "x", "--model", "damaged")


def test_registering_before_a_run_says_what_to_do(here: Path) -> None:
    assert "outputs/finetune/model is missing" in refused("register")
    assert not (here / "mlflow.db").exists()


def test_status_of_a_fresh_project(here: Path) -> None:
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 0, result.output
    assert result.output.count("would run") == 5
    assert "not registered yet" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_a_dry_run_names_the_stages_that_other_parameters_concern_and_starts_nothing(here: Path) -> None:
    run_dvc(here, "repro")
    runs = len(read_overview(here).runs)
    assert "would run" not in CliRunner().invoke(app, ["run", "--dry-run"]).output
    dry = CliRunner().invoke(app, ["run", "--dry-run", "--set", "finetune.lr=0.5"])
    assert dry.exit_code == 0, dry.output
    lines = {line.split()[0]: line for line in dry.output.splitlines() if "would run" in line}
    assert "`finetune" in lines["finetune"]
    assert "the result of finetune" in lines["evaluate"]
    assert "teacher" not in lines
    assert not (here / ".worktrees").exists()
    assert len(read_overview(here).runs) == runs


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        (
            ["changed deps: lolcats_core/model, lolcats_core/teacher, outputs/prepare/train"],
            "code (2), the result of prepare",
        ),
        (["changed deps: outputs/select/a, outputs/select/b, params.yaml"], "parameters, the result of select"),
        (["changed deps: outputs/a/x, outputs/b/x, outputs/c/x"], "results of a, b and c"),
        (["changed deps: package.yaml", "changed outs: outputs/inputs"], "the installed package"),
        (["changed outs: outputs/inputs"], "changed outs"),
        (["changed command"], "changed command"),
    ],
)
def test_a_reason_is_a_few_words(reasons: list[str], said: str) -> None:
    assert short(reasons) == said

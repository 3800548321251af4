"""The graph comes from DVC, and a stage that is ended leaves no process behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from lolcats_common.errors import UserError
from tasks.registry import register
from tasks.versioning import dvc_graph, worktrees
from tasks.versioning.garbage import collect
from tests.conftest import fake_dvc, hold, run_git, shell_stage
from tests.tasks.processes import LAST_RESORT, processes_in, start, wait_for, wait_for_text


@pytest.fixture
def shell_project(fake_project: Path) -> Path:
    """Two stages without Python, the later one written first."""
    last, first = shell_stage("outputs/last/x", "outputs/first/x"), shell_stage("outputs/first/x", "source.txt")
    (fake_project / "dvc.yaml").write_text(fake_dvc("last", "first", last=last, first=first))
    (fake_project / "source.txt").write_text("a")
    return fake_project


@pytest.mark.slow
def test_a_stage_runs_then_stays_and_comes_back_from_the_run_cache(shell_project: Path) -> None:
    lines: list[str] = []

    def states() -> list[str]:
        return [dvc_graph.repro(name, shell_project, on_line=lines.append).state for name in ("first", "last")]

    assert dvc_graph.stages(shell_project) == ["first", "last"]
    assert states() == ["ran", "ran"]
    assert "hello" in lines
    assert not any("git add" in line for line in lines)
    assert states() == ["unchanged", "unchanged"]
    assert dvc_graph.changed(shell_project) == {}
    (shell_project / "source.txt").write_text("b")
    assert dvc_graph.changed(shell_project) == {"first": ["changed deps: source.txt"]}
    assert states() == ["ran", "ran"]
    (shell_project / "source.txt").write_text("a")
    assert states() == ["restored", "restored"]
    shutil.rmtree(shell_project / "outputs")
    assert states() == ["restored", "restored"]
    assert states() == ["unchanged", "unchanged"]


@pytest.mark.slow
def test_an_archive_without_git_runs_with_one_line_of_advice_and_uses_git_once_there_is_one(
    shell_project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(shell_project / ".git")
    assert dvc_graph.stages(shell_project) == ["first", "last"]
    states = [dvc_graph.repro(name, shell_project, on_line=lambda line: None).state for name in ("first", "last")]
    assert states == ["ran", "ran"]
    assert dvc_graph.changed(shell_project) == {}
    advice = [record.message for record in caplog.records if "git init && git add --all" in record.message]
    assert len(advice) == 1
    (shell_project / "source.txt").write_text("b")
    dvc_graph.repro("first", shell_project, on_line=lambda line: None)
    dvc_graph.repro("last", shell_project, on_line=lambda line: None)
    assert collect(shell_project).objects  # the outputs of before
    with pytest.raises(UserError, match=r"is no git checkout with a commit: edit params\.yaml; .* git init"):
        worktrees.prepare(shell_project, None, {"seed": 1})

    run_git(shell_project, "init", "--quiet")
    run_git(shell_project, "add", "--all")
    run_git(shell_project, "commit", "--quiet", "--message", "start")
    experiment = worktrees.prepare(shell_project, None, {"seed": 1})
    assert dvc_graph.run_dvc(experiment.root, "exp", "list") == ""
    assert "no_scm" not in (shell_project / ".dvc" / "config.local").read_text()


def test_a_failing_command_is_one_error_that_names_the_stage(shell_project: Path) -> None:
    (shell_project / "source.txt").unlink()
    with pytest.raises(dvc_graph.StageFailed, match="first: "):
        dvc_graph.repro("first", shell_project, on_line=lambda line: None)


def test_a_broken_dvc_yaml_is_one_error(shell_project: Path) -> None:
    (shell_project / "dvc.yaml").write_text("stages: [")
    with pytest.raises(ValueError, match="dvc dag") as caught:
        dvc_graph.stages(shell_project)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_stage_s_own_error_is_what_the_caller_gets(fake_project: Path) -> None:
    text = (fake_project / "params.yaml").read_text()
    (fake_project / "params.yaml").write_text(text.replace("seed: 0", "seed: 13"))
    with pytest.raises(dvc_graph.StageFailed, match="teacher: `seed` 13 brings bad luck"):
        dvc_graph.repro("teacher", fake_project, on_line=lambda line: None)


def test_an_exception_ends_the_whole_group_even_what_ignores_sigterm(shell_project: Path) -> None:
    stubborn = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    (shell_project / "dvc.yaml").write_text(f'stages:\n  first:\n    cmd: "{stubborn}"\n')

    def stop(line: str) -> None:
        if line == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc_graph.repro("first", shell_project, on_line=stop, grace=1.0)
    wait_for(lambda: not list(processes_in(shell_project)), "the end of the group")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_dvc_ends_its_stage(fake_project: Path, tmp_path: Path, number: signal.Signals) -> None:
    hold(fake_project, "teacher 1")
    log = tmp_path / "log"
    process = start(fake_project, log, "-m", "dvc", "repro", "teacher")
    wait_for_text(log, "step 1", process)
    process.send_signal(number)
    process.wait(LAST_RESORT)
    wait_for(lambda: not list(processes_in(fake_project)), "the end of the stage")


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "schema: '2.0'\nstages:\n  first:\n", "stages: [", "\x00"])
def test_a_half_written_dvc_lock_costs_nothing(shell_project: Path, content: str) -> None:
    for name in ("first", "last"):
        dvc_graph.repro(name, shell_project, on_line=lambda line: None)
    whole = (shell_project / "dvc.lock").read_text()
    (shell_project / "dvc.lock").write_text(content)
    (shell_project / ".dvc" / "tmp" / "rwlock").write_text('{"a": ')
    states = [dvc_graph.repro(name, shell_project, on_line=lambda line: None).state for name in ("first", "last")]
    assert states == ["restored", "restored"]
    assert (shell_project / "dvc.lock").read_text() == whole


def flip(path: Path) -> None:
    """One bit of a file becomes another; size, times and mode stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a file", "the list of files"])
def test_what_a_damaged_cache_holds_is_no_result_and_the_stage_runs_again(
    shell_project: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    dvc_graph.repro("first", shell_project, on_line=lambda line: None)
    shutil.rmtree(shell_project / "outputs")
    (listing,) = (shell_project / ".dvc" / "cache" / "files" / "md5").glob("*/*.dir")
    object_of_x = hashlib.md5(b"a").hexdigest()
    flip(listing if what == "the list of files" else listing.parents[1] / object_of_x[:2] / object_of_x[2:])
    assert dvc_graph.repro("first", shell_project, on_line=lambda line: None).state == "ran"
    assert (shell_project / "outputs" / "first" / "x").read_text() == "a"
    shutil.rmtree(shell_project / "outputs")
    assert dvc_graph.repro("first", shell_project, on_line=lambda line: None).state == "restored"
    assert (shell_project / "outputs" / "first" / "x").read_text() == "a"


@pytest.mark.slow
def test_what_was_pulled_from_a_tampered_remote_is_seen_before_it_is_registered(shell_project: Path) -> None:
    remote = shell_project.parent / "remote"
    dvc_graph.run_dvc(shell_project, "remote", "add", "--default", "away", str(remote))
    for name in ("first", "last"):
        dvc_graph.repro(name, shell_project, on_line=lambda line: None)
    assert dvc_graph.push_if_remote(shell_project)
    object_of_x = hashlib.md5(b"a").hexdigest()
    flip(remote / "files" / "md5" / object_of_x[:2] / object_of_x[2:])
    shutil.rmtree(shell_project / "outputs")
    shutil.rmtree(shell_project / ".dvc" / "cache")
    dvc_graph.run_dvc(shell_project, "pull")
    assert (shell_project / "outputs" / "last" / "x").read_text() != "a"
    model = shell_project / register.MODEL / "config.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    with pytest.raises(UserError, match=r"outputs are not those .* damaged objects of DVC's cache were removed"):
        register.checked_lock(shell_project)
    for name in ("first", "last"):
        dvc_graph.repro(name, shell_project, on_line=lambda line: None)
    assert (shell_project / "outputs" / "last" / "x").read_text() == "a"
    assert dvc_graph.changed(shell_project, anew=True) == {}


@pytest.mark.slow
def test_a_failing_dvc_is_told_by_its_error_and_not_by_a_warning_before_it(shell_project: Path) -> None:
    (shell_project / ".git" / "refs" / "heads" / "broken").write_text("0" * 39 + "\n")
    with pytest.raises(UserError, match="failed: ERROR: "):
        collect(shell_project)


@pytest.mark.parametrize("damaged", [b"[core\n", b"\xff\xfe[", b"[core]\nx\n"])
def test_damaged_settings_are_one_line_that_names_the_file(shell_project: Path, damaged: bytes) -> None:
    (shell_project / ".dvc" / "config.local").write_bytes(damaged)
    with pytest.raises(UserError, match=r"\.dvc/config\.local cannot be read: "):
        dvc_graph.stages(shell_project)

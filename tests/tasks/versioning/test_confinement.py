"""A run over Prefect's API overrides what this machine's owner allows, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams
from lolcats_common.sources import find_text
from tasks.versioning import confinement
from tasks.versioning.confinement import SOURCES_VARIABLE, check_allowed
from tests.conftest import run_git

COMMIT, OTHER = "a" * 40, "b" * 40
LEADS_OUT = "leads out of the project's open folders and of LOLCATS_SOURCES"


def commit_params(project: Path, *changes: tuple[str, str]) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    run_git(project, "commit", "--quiet", "--all", "--message", "params")


def test_no_path_of_a_run_over_the_api_leaves_the_project(
    fake_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (outside / "secret.txt", fake_project.parent / "secret.txt"):
        file.write_text("secret")
    monkeypatch.setenv("HOME", str(outside))
    (fake_project / "link").symlink_to(outside)
    (fake_project / "folder").mkdir()
    (fake_project / "folder" / "text.txt").symlink_to(outside / "secret.txt")
    (fake_project / "a" / "b" / "c").mkdir(parents=True)
    # Followed step by step the path through it stays inside; with `..` taken away first it does not.
    (fake_project / "deep").symlink_to(fake_project / "a" / "b" / "c")
    (fake_project / ".prefect").mkdir(exist_ok=True)
    (fake_project / ".prefect" / "login.txt").write_text("user:password")
    for values in (
        {"data.source": "/etc/passwd"},
        {"data": {"source": "../../*.txt"}},
        {"data.source": "a*/../../../etc/*"},
        {"data.source": "link/secret.txt"},
        {"data.source": "li*/secret.txt"},
        {"data.source": "folder"},
        {"data.source": "deep/../../secret.txt"},
        {"data.source": ".prefect/login.txt"},
        {"data.source": "~/secret.txt"},
        {"data.source": "~/*.txt"},
        {"data.source": "~root/x.txt"},
        {"teacher.source": "~"},
        {"teacher.source": "~root"},
        {"teacher.source": "/root"},
    ):
        with pytest.raises(UserError, match=LEADS_OUT):
            check_allowed(fake_project, None, values)


@pytest.mark.parametrize("source", ["/", "/proc", "~", "link"])
def test_what_lies_outside_is_not_walked_through(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (fake_project / "link").symlink_to("/")
    monkeypatch.setattr(confinement, "_below", lambda folder: pytest.fail(f"{folder} was walked through"))
    for key in ("teacher.source", "data.source"):
        with pytest.raises(UserError, match=LEADS_OUT):
            check_allowed(fake_project, None, {key: source})


def test_what_only_the_owner_decides_is_no_override(fake_project: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ({"relinearize.drift_source": "/var/log/*.log"}, "`relinearize.drift_source` must stay"),
        ({"relinearize": {"follow_hub": True}}, "`relinearize.follow_hub` must stay"),
        ({"register.name": "production"}, "`register.name` must stay"),
        ({"gates.perplexity": "disabled"}, "`gates.perplexity` must stay"),
        ({"evaluate.tasks": []}, "`evaluate.tasks` must stay"),
        ({"evaluate": {"recall_gaps": [8], "recall_samples": 1}}, "`evaluate.recall_gaps` must stay"),
        ({"teacher.trust_remote_code": True}, "of builtin must stand"),
        ({"teacher": {"source": "a/b", "trust_remote_code": True}}, "of a/b must stand"),
        ({"data": "x"}, "`data` must be a mapping"),
        (["data.source"], "`set` must be a mapping"),
        ({"data.source": "~nosuchuser/x.txt"}, "no user ~nosuchuser"),
    ]
    for values, message in cases:
        with pytest.raises(UserError, match=message):
            check_allowed(fake_project, None, values)


def test_trust_holds_for_one_teacher_at_one_revision(fake_project: Path) -> None:
    commit_params(
        fake_project,
        ("  source: builtin #", "  source: a/b #"),
        ("  revision: null", f"  revision: {COMMIT}"),
        ("trust_remote_code: false", "trust_remote_code: true"),
    )
    check_allowed(fake_project, None, {"transfer.lr": 0.1, "teacher.revision": COMMIT})
    check_allowed(fake_project, None, {"teacher.revision": OTHER, "teacher.trust_remote_code": False})
    for values in ({"teacher.revision": OTHER}, {"teacher.source": "c/d"}):
        with pytest.raises(UserError, match="must stand with this source and revision"):
            check_allowed(fake_project, None, values)
    with pytest.raises(UserError, match="of mistralai/Mistral-7B"):
        check_allowed(fake_project, "mistral_7b", None)


def test_trust_that_is_not_committed_is_none(fake_project: Path) -> None:
    params = fake_project / "params.yaml"
    params.write_text(params.read_text().replace("trust_remote_code: false", "trust_remote_code: true", 1))
    with pytest.raises(UserError, match="of builtin must stand"):
        check_allowed(fake_project, None, {"teacher.trust_remote_code": True})


def test_what_the_owner_allows_is_allowed(fake_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for folder in (texts, fake_project):
        (folder / "a.txt").write_text("a")
    check_allowed(fake_project, None, None)
    check_allowed(fake_project, "mistral_7b", {"data": None})
    check_allowed(fake_project, None, {"data.source": "*.txt", "teacher.source": "owner/model", "transfer.lr": 0.1})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(SOURCES_VARIABLE, "/srv/texts:~/texts")
    check_allowed(fake_project, None, {"data.source": str(texts / "*.txt"), "teacher.source": "/srv/texts/teacher"})
    check_allowed(fake_project, None, {"data.source": "~/texts"})


def test_a_data_set_is_named_with_its_owner_since_other_names_stand_for_ways_to_read_this_directory(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="owner/name"):
        find_text(DataParams(source="pandas", revision=COMMIT), tmp_path)

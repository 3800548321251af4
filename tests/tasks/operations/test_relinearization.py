"""What a scheduled run finds out: newest revisions, unfinished results, drift of the text."""

from __future__ import annotations

import dataclasses
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.files import write_json
from lolcats_common.params import Params, load_params
from tasks.operations import drift, relinearization, services
from tasks.registry import register
from tasks.registry.promotion import promote, rollback, run_gates
from tasks.versioning import dvc_graph, worktrees
from tests.conftest import run_git
from tests.tasks.conftest import set_model
from tests.tasks.registry.test_promotion import UNPROBED

NAME = "lolcats-demo"


def with_sections(params: Params, **sections: dict[str, Any]) -> Params:
    changed = {name: dataclasses.replace(getattr(params, name), **values) for name, values in sections.items()}
    return dataclasses.replace(params, **changed)


def test_the_newest_revisions_are_those_of_hub_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Hub:
        def model_info(self, name: str) -> Any:
            return SimpleNamespace(sha=f"{name}-new")

        def dataset_info(self, name: str) -> Any:
            raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    hub = with_sections(Params(), teacher={"source": "owner/model", "revision": "0" * 40})
    assert relinearization.newest_revisions(hub, tmp_path) == {"teacher.revision": "owner/model-new"}
    assert relinearization.newest_revisions(Params(), tmp_path) == {}
    trusted = with_sections(hub, teacher={"trust_remote_code": True})
    assert relinearization.newest_revisions(trusted, tmp_path) == {}
    both = with_sections(hub, data={"source": "owner/text", "revision": "0" * 40})
    with pytest.raises(Unavailable, match="offline"):
        relinearization.newest_revisions(both, tmp_path)


def test_what_a_run_that_was_cut_short_left_undone_is_found_and_a_rolled_back_version_stays_so(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_graph, "refresh", lambda root, env: None)
    params = load_params(finished / "params.yaml")
    chosen = worktrees.Worktree("relinearize", finished, params, {})

    def undone() -> list[str]:
        return list(relinearization.changes(finished, chosen))

    assert undone() == ["register"]
    version = register.register(finished, params).version
    assert undone() == ["commit"]
    branch = relinearization.commit(finished, chosen, version, {"finetune": ["params.yaml"]})
    assert run_git(finished, "show", f"{branch}:dvc.lock") == (finished / "dvc.lock").read_text()
    assert undone() == ["gates"]
    run_gates(finished, NAME, UNPROBED, version)
    assert undone() == ["promote"]
    promote(finished, NAME, version)
    assert undone() == []

    set_model(finished, "m2")
    better = register.register(finished, params).version
    relinearization.commit(finished, chosen, better, {})
    run_gates(finished, NAME, UNPROBED, better)
    promote(finished, NAME, better)
    assert rollback(finished, NAME) == (version, better)
    assert undone() == []


def test_drift_is_the_champion_s_perplexity_on_recent_text_over_that_on_its_own(finished: Path) -> None:
    (finished / "recent.jsonl").write_text('{"text": "abcabcabc abc"}\n' * 40)
    params = with_sections(
        load_params(finished / "params.yaml"),
        data={"sequence_length": 16},
        relinearize={"drift_source": "recent.jsonl", "max_drift": 1e6},
    )
    with pytest.raises(UserError, match="no version or alias 'champion'"):
        drift.measure(finished, params)
    register.register(finished, params)
    run_gates(finished, NAME, UNPROBED, "1")
    promote(finished, NAME, "1")
    found = drift.measure(finished, params)
    assert (found.version, found.validation, found.drifted) == ("1", 12.0, False)
    assert found.recent > 1
    assert dataclasses.replace(found, bound=found.recent / found.validation * 0.99).drifted
    assert dataclasses.replace(found, recent=float("nan")).drifted
    with pytest.raises(UserError, match="drift_source"):
        drift.measure(finished, with_sections(params, relinearize={"drift_source": None}))


@pytest.mark.parametrize("login", ["user", "user:short", ":long-enough-password"])
def test_a_login_that_protects_nothing_is_refused_without_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    monkeypatch.setenv(services.AUTH, login)
    with pytest.raises(UserError) as caught:
        services._login()
    assert login not in str(caught.value).replace("user:password", "")


def test_files_with_a_login_are_their_owner_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret.env"
    file.write_text("old")
    file.chmod(0o644)
    services._private(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "new"


def test_only_the_process_that_was_started_counts_as_running(tmp_path: Path) -> None:
    write_json(tmp_path / ".prefect" / "services.json", {"prefect": [psutil.Process().pid, 1.0]})
    assert services._running(tmp_path) == {}
    assert services.stop(tmp_path) == []


def test_a_copied_project_does_not_take_the_original_s_servers_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    monkeypatch.chdir(original)  # where its servers run; this process stands for one
    me = psutil.Process()
    write_json(original / ".prefect" / "services.json", {"prefect": [me.pid, me.create_time()]})
    shutil.copytree(original, copy)
    assert list(services._running(original)) == ["prefect"]
    assert services._running(copy) == {}

"""The store's overview says what MLflow's client says, whichever way it is read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lolcats_common.errors import Unavailable
from tasks.runner import new_store
from tasks.runner.mlflow_run import KIND, NOTE, connect, experiment_id
from tasks.runner.store import NEWEST, Overview, ask_client, read_overview


def test_the_database_says_what_the_client_says(fake_project: Path) -> None:
    client = connect(fake_project)
    experiment = experiment_id(client)
    runs = [client.create_run(experiment, run_name=f"run {i}", start_time=1000 + i) for i in range(NEWEST + 2)]
    client.delete_run(runs[-1].info.run_id)
    client.set_terminated(runs[0].info.run_id, "FAILED")
    client.create_run(client.create_experiment("another"), run_name="elsewhere", start_time=9000)
    for name, count in (("b", 1), ("a", NEWEST + 2)):
        client.create_registered_model(name)
        for _ in range(count):
            client.create_model_version(name, (fake_project / "model").as_uri(), run_id=runs[0].info.run_id)
    for alias, number in (("previous", "1"), ("champion", "12"), ("candidate", "12")):
        client.set_registered_model_alias("a", alias, number)
    client.delete_model_version("a", "5")

    overview = read_overview(fake_project)
    asked = ask_client(fake_project)
    assert overview.runs == asked.runs
    assert sorted(overview.versions) == sorted(asked.versions)
    assert sorted(overview.aliases) == sorted(asked.aliases)
    assert overview.newest_versions() == asked.newest_versions()
    assert [run.name for run in overview.runs] == [f"run {i}" for i in range(NEWEST, 0, -1)]
    shown = overview.newest_versions()
    assert [(version.model, version.number, aliases) for version, aliases in shown[:2]] == [
        ("a", "12", "candidate, champion"),
        ("a", "11", ""),
    ]
    assert [version.model for version, _ in shown] == ["a"] * NEWEST + ["b"]


def test_a_project_without_a_store_has_an_empty_overview_and_gets_no_store(fake_project: Path) -> None:
    (fake_project / "mlflow.db").unlink()
    assert read_overview(fake_project) == Overview([], [], [])
    assert not (fake_project / "mlflow.db").exists()


def test_a_damaged_store_is_one_line(fake_project: Path) -> None:
    (fake_project / "mlflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Unavailable, match=r"mlflow\.db cannot be read"):
        read_overview(fake_project)


def test_the_experiment_opens_as_model_training_and_a_kind_that_a_person_chose_stays(tmp_path: Path) -> None:
    client = connect(tmp_path)
    experiment = client.create_experiment("lolcats", tags={KIND: "genai_development"})  # as one of before may have
    assert experiment_id(client) == experiment
    tags = client.get_experiment(experiment).tags
    assert tags[KIND] == "genai_development"
    assert "`lolcats run`" in tags[NOTE]
    client.delete_experiment_tag(experiment, KIND)
    experiment_id(client)
    assert client.get_experiment(experiment).tags[KIND] == "custom_model_development"


def test_a_store_that_cannot_be_opened_is_said_to_be_so_at_once(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s"))  # as MLflow would
    monkeypatch.setattr(new_store.sqlite3, "connect", closed)  # the administrator, as whom tests may run, opens all
    with pytest.raises(Unavailable, match=r"mlflow\.db cannot be used: unable to open database file"):
        connect(fake_project)

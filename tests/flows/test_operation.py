"""Operated for real: servers, worker, schedule, event; promotion, refusal and rollback of versions."""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path
from typing import Any

import pytest

from lolcats_core.files import sha256_tree
from tasks import registry
from tasks.promotion import CHAMPION, PREVIOUS, alias_version
from tasks.tracking import connect
from tests.conftest import run_git
from tests.flows.operations import Servers, operate, serving
from tests.tasks.processes import processes_in

NIGHTLY = "relinearize/nightly"
NAME = "lolcats-demo"


def champion(root: Path, alias: str = CHAMPION) -> tuple[str, str] | None:
    """Number and content of the version that an alias names."""
    client = connect(root)
    version = alias_version(client, NAME, alias)
    if version is None:
        return None
    with registry.stored_model(client, version) as stored:
        return str(version.version), sha256_tree(stored / "artifacts" / "model")


def versions(root: Path) -> int:
    return len(connect(root).search_model_versions(f"name = '{NAME}'"))


def once_by_schedule(servers: Servers) -> None:
    """A schedule of relinearize/nightly with one date, a few seconds from now."""
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    rule = f"DTSTART:{at:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=DAILY;COUNT=1"
    body = [{"active": True, "schedule": {"rrule": rule, "timezone": "UTC"}}]
    servers.api(f"/deployments/{servers.deployment(NIGHTLY)}/schedules", body)


def emit(servers: Servers, event: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    resource = {"prefect.resource.id": "lolcats.data"}
    servers.api("/events", [{"id": str(uuid.uuid4()), "event": event, "occurred": now, "resource": resource}])


@pytest.mark.slow
def test_schedule_event_promotion_refusal_and_rollback(fake_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = operate(fake_project)
    with serving(fake_project) as servers:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", servers.variables["MLFLOW_TRACKING_URI"])

        def ended(run: str) -> tuple[str, str]:
            state = servers.ended(run)
            return state["name"], state["message"] or servers.log()

        # By schedule; the first student is the champion.
        once_by_schedule(servers)
        name, message = ended(servers.new_run(NIGHTLY, 0))
        assert (name, "version 1 is the champion" in message) == ("Promoted", True), message
        first = champion(fake_project)
        assert first is not None
        assert first[0] == "1"

        # By event; nothing changed, so there is no version.
        emit(servers, "lolcats.changed")
        name, message = ended(servers.new_run(NIGHTLY, 1))
        assert name == "UpToDate", message
        assert versions(fake_project) == 1

        # By hand; the text changed and the student is better.
        data.write_text("11.5")
        name, message = ended(servers.run(NIGHTLY))
        assert name == "Promoted", message
        second = champion(fake_project)
        assert second is not None
        assert (second[0], champion(fake_project, PREVIOUS)) == ("2", first)
        assert second[1] != first[1]

        # The text changed and the student is worse: refused with the reason, the champion stays.
        data.write_text("30.0")
        name, message = ended(servers.run(NIGHTLY))
        assert name == "Refused", message
        assert "perplexity" in message
        assert champion(fake_project) == second
        assert versions(fake_project) == 3

        # Back: the first student serves again, byte for byte.
        assert servers.ended(servers.run("rollback/local"))["type"] == "COMPLETED", servers.log()
        assert champion(fake_project) == first
        assert champion(fake_project, PREVIOUS) == second

        report = connect(fake_project).get_model_version(NAME, "3").tags
        assert report["gates"] == "refused"
        branches = run_git(fake_project, "branch", "--list", "relinearize/*").split()
        assert len(branches) == 1
        assert "11.5" not in run_git(fake_project, "status", "--porcelain")
        assert set(artifact_keys(servers)) == {"changes", "gates", "summary"}
    assert list(processes_in(fake_project)) == []


def artifact_keys(servers: Servers) -> list[Any]:
    return [found["key"] for found in servers.api("/artifacts/latest/filter", {})]

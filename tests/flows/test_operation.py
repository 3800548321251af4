"""Operated for real: servers with a login, worker, schedule, event, webhook; promotion, refusal, rollback, resumption.

The tests share one served project and follow each other.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import re
import stat
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lolcats_common.files import sha256_tree
from tasks.operations.services import SERVICES
from tasks.registry.promotion import CHAMPION, PREVIOUS
from tasks.registry.versions import alias_version, stored_model
from tasks.runner.mlflow_run import connect
from tests.conftest import hold, run_git
from tests.flows.conftest import LOGIN, Operated
from tests.flows.faults import Campaign, Project, made_from
from tests.flows.operations import OVER, Servers
from tests.tasks.processes import processes_in, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NIGHTLY = "relinearize/nightly"
NAME = "lolcats-demo"


def champion(root: Path, alias: str = CHAMPION) -> tuple[str, str] | None:
    """Number and content of the version that an alias names."""
    client = connect(root)
    version = alias_version(client, NAME, alias)
    if version is None:
        return None
    with stored_model(client, version) as stored:
        return str(version.version), sha256_tree(stored / "artifacts" / "model")


def versions(root: Path) -> int:
    return len(connect(root).search_model_versions(f"name = '{NAME}'"))


def once_by_schedule(servers: Servers) -> str:
    """A schedule of relinearize/nightly with one date, instead of its own one, which may come round during the test.

    Returns the run that it brings. A date that is past before Prefect's scheduler looks for dates to come brings none:
    then there is another one, further away.
    """
    deployment = servers.deployment(NIGHTLY)
    for seconds in (8, 16, 32, 64, 128):
        at = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).replace(microsecond=0)
        rule = f"DTSTART:{at:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=DAILY;COUNT=1"
        servers.schedule(NIGHTLY, {"rrule": rule, "timezone": "UTC"})

        def planned(at: datetime.datetime = at) -> list[str]:
            found = servers.api("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})
            return [run["id"] for run in found if datetime.datetime.fromisoformat(run["expected_start_time"]) == at]

        servers.wait(lambda at=at: planned() or datetime.datetime.now(datetime.UTC) > at, "a planned run, or its date")
        if found := planned():
            return found[0]
    raise AssertionError(f"the scheduler did not look for dates within {seconds} s")


def emit(servers: Servers, event: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    resource = {"prefect.resource.id": "lolcats.data"}
    servers.api("/events", [{"id": str(uuid.uuid4()), "event": event, "occurred": now, "resource": resource}])


def test_schedule_event_promotion_refusal_and_rollback(operated: Operated) -> None:
    root, data, servers = operated.root, operated.data, operated.servers

    def ended(run: str) -> tuple[str, str]:
        state = servers.ended(run)
        return state["name"], state["message"] or servers.log()

    # By schedule; the first student is the champion.
    name, message = ended(once_by_schedule(servers))
    assert (name, message) == ("Promoted", "version 1 is the champion")
    first = champion(root)
    assert first is not None
    assert first[0] == "1"

    # By event; nothing changed, so there is no version.
    emit(servers, "lolcats.changed")
    name, message = ended(servers.new_run(NIGHTLY, 1))
    assert name == "UpToDate", message
    assert versions(root) == 1

    # By hand; the text changed and the student is better.
    data.write_text("11.5")
    name, message = ended(servers.run(NIGHTLY))
    assert name == "Promoted", message
    second = champion(root)
    assert second is not None
    assert (second[0], champion(root, PREVIOUS)) == ("2", first)
    assert second[1] != first[1]

    # The text changed and the student is worse: refused with the reason, the champion stays.
    data.write_text("30.0")
    name, message = ended(servers.run(NIGHTLY))
    assert name == "Refused", message
    assert "perplexity" in message
    assert champion(root) == second
    assert versions(root) == 3

    # Back: the first student serves again, byte for byte.
    assert servers.ended(servers.run("rollback/previous"))["type"] == "COMPLETED", servers.log()
    assert champion(root) == first
    assert champion(root, PREVIOUS) == second

    tags = connect(root).get_model_version(NAME, "3").tags
    assert (tags["gates"], tags["git.dirty"]) == ("refused", "false")
    assert run_git(root, "branch", "--list", "relinearize/*").split() == [tags["lock.branch"]]
    assert "11.5" not in run_git(root, "status", "--porcelain")
    assert set(artifact_keys(servers)) == {"changes", "gates", "summary"}


def test_the_refusal_and_nothing_else_was_posted_to_the_webhook(operated: Operated) -> None:
    operated.servers.wait(lambda: operated.messages, "a message")
    message = operated.messages[0]
    assert operated.messages == [message] * len(operated.messages)  # at least once: docs/operations.md
    name, said = r"relinearize [\w.]+, [\d-]+ [\d:]+", "Refused. version 3 is refused, the champion stays: "
    assert re.match(f"{name}: {said}", message["text"])
    assert operated.servers.api(f"/flow_runs/{message['flow_run_id']}")["state"]["name"] == "Refused"


def test_both_servers_ask_for_the_login(operated: Operated) -> None:
    variables = operated.servers.variables
    questions = {
        "Prefect": urllib.request.Request(f"{variables['PREFECT_API_URL']}/admin/version"),
        "MLflow": urllib.request.Request(
            f"{variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get-by-name?experiment_name=lolcats"
        ),
    }
    for login, answer in ((None, 401), ("operator:a-wrong-password", 401), (LOGIN, 200)):
        for name, question in questions.items():
            if login:
                question.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
            try:
                status = urllib.request.urlopen(question).status
            except urllib.error.HTTPError as error:
                status = error.code
            assert status == answer, (name, login)


def assert_no_secret_on_a_command_line(operated: Operated) -> None:
    """Any user of a machine can read the command lines of all its processes."""
    secrets = [LOGIN.partition(":")[2], operated.webhook.rpartition("/")[2]]
    lines = list(processes_in(operated.root))
    assert len(lines) >= len(SERVICES)
    assert not [line for line in lines if any(secret in line for secret in secrets)]


def test_a_run_with_overrides_by_the_command_line_ends_as_an_experiment_of_its_own(operated: Operated) -> None:
    values = json.dumps({"finetune.lr": 0.0125})
    chosen = ["-p", "preset=mistral_7b", "-p", f"set={values}", "-p", "register=false", "--watch"]
    done = operated.servers.call("prefect", "deployment", "run", "linearize/by-hand", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr + operated.servers.log()
    (worktree,) = operated.root.glob(".worktrees/mistral-7b-*")
    params = yaml.safe_load((worktree / "params.yaml").read_text())
    assert (params["finetune"]["lr"], params["teacher"]["source"]) == (0.0125, "mistralai/Mistral-7B-v0.1")
    assert (worktree / "outputs" / "finetune" / "result.txt").read_text() == "finetune 0.0125"
    assert worktree.name in run_git(operated.root, "for-each-ref", "refs/exps")


def test_a_killed_run_starts_again_by_itself_and_continues_from_its_last_step(operated: Operated) -> None:
    root, servers = operated.root, operated.servers
    hold(root, "finetune 3", "finetune 5")
    run_git(root, "commit", "--all", "--quiet", "--message", "it waits")
    operated.data.write_text("11.0")
    known = len(servers.runs(NIGHTLY))
    run = servers.run(NIGHTLY)

    def reached(step: int, run: str) -> None:
        def there() -> bool:
            files = list(root.glob(".worktrees/relinearize/.scratch/finetune/*/step.txt"))
            return bool(files) and files[0].read_text() == str(step)

        def over() -> str:
            state = servers.api(f"/flow_runs/{run}")["state"]
            return servers.gone() or (f"the run ended: {state}" if state["type"] in OVER else "")

        wait_for(there, f"step {step} of finetune", over, pause=0.5)

    reached(3, run)
    assert_no_secret_on_a_command_line(operated)
    (flow,) = [found for found in psutil.process_iter() if is_flow(found, run)]
    flow.kill()
    state = servers.ended(run)
    assert state["name"] == "Crashed", state
    resumed = servers.new_run(NIGHTLY, known + 1)
    assert servers.api(f"/flow_runs/{resumed}")["parameters"] == {"preset": None, "set": None, "restarts": 1}
    # Whoever comes while it runs waits for it, and then finds nothing left to do.
    reached(5, resumed)
    queued = servers.run(NIGHTLY)

    def waits() -> bool:
        return bool(servers.api(f"/flow_runs/{queued}")["state"]["name"] == "AwaitingConcurrencySlot")

    servers.wait(waits, "a run that waits")
    hold(root)
    state = servers.ended(resumed)
    assert state["name"] == "Promoted", state["message"]
    assert servers.ended(queued)["name"] == "UpToDate"
    metrics = json.loads((root / ".worktrees/relinearize/outputs/finetune/metrics.json").read_text())
    assert metrics["started_at"] >= 3


def test_work_that_crashes_again_and_again_is_given_up(operated: Operated) -> None:
    state = operated.servers.ended(operated.servers.run(NIGHTLY, restarts=11))
    assert state["name"] == "Failed"
    assert "given up after 10 restarts, each of which crashed" in state["message"]


def is_flow(process: psutil.Process, run: str) -> bool:
    """Whether a process is that of this flow run; those of earlier runs may still be on their way out."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[1:] == ["-m", "prefect.engine"] and process.environ()["PREFECT__FLOW_RUN_ID"] == run
    return False


def test_a_rollback_waits_until_mlflow_answers_again(operated: Operated) -> None:
    servers, before = operated.servers, champion(operated.root)
    known = json.loads((operated.root / ".prefect" / "services.json").read_text())
    mlflow = psutil.Process(known["mlflow"][0])
    said = len(servers.log())
    servers.absent = {"mlflow"}
    for process in (mlflow, *mlflow.children()):
        process.kill()
    run = servers.run("rollback/previous")
    servers.wait(lambda: "trying again" in servers.log()[said:], "a second attempt")
    servers.bring_back()
    state = servers.ended(run)
    assert state["name"] == "Completed", state["message"]
    assert champion(operated.root, PREVIOUS) == before


def test_processes_killed_at_random_lose_nothing_and_leave_nothing_half_done(operated: Operated) -> None:
    """A short form of the campaign in tests/flows/faults.py; docs/operations.md has the counts of the long one."""

    def change(number: int) -> None:
        operated.data.write_text(str(10.9 - 0.01 * number))

    (operated.root / "pause.txt").write_text("0.2")
    run_git(operated.root, "commit", "--all", "--quiet", "--message", "it does not wait")
    change(0)
    project = Project(operated.root, NAME, change, made_from(operated.data), steps=9)
    campaign = Campaign(project, operated.servers, seed=1, versions=versions(operated.root))
    campaign.disturb(kills=1)
    assert sum(campaign.victims.values()) >= 1


def test_no_secret_is_in_a_store_a_log_or_a_run_and_nothing_is_left_running(operated: Operated) -> None:
    # Nothing met a locked database, which loses or repeats what Prefect does by itself.
    assert "database is locked" not in operated.servers.log("prefect")
    operated.servers.stop()
    private = {"services.env", "auth.ini"}
    secrets = [LOGIN.partition(":")[2].encode(), operated.webhook.rpartition("/")[2].encode()]
    assert not (operated.root / ".prefect" / "services.env").exists()
    searched = 0
    for file in operated.root.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            if file.name in private:
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
            else:
                assert not [secret for secret in secrets if secret in content], file
                searched += 1
    assert searched > 100
    wait_for(lambda: not list(processes_in(operated.root)), "the end of every process")


def artifact_keys(servers: Servers) -> list[Any]:
    return [found["key"] for found in servers.api("/artifacts/latest/filter", {})]

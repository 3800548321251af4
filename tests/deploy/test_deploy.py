"""What is deployed elsewhere, checked as far as a machine without a cluster or a container engine can."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.actions import CallWebhook
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.templating import apply_values

from flows.automations import automations

ROOT = Path(__file__).parents[2]
PREFECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def rendered(kind: str, **chosen: Any) -> dict[str, Any]:
    """The pool's job configuration with the defaults of its variables and `chosen` over them."""
    template = json.loads((ROOT / "deploy" / f"{kind}-pool.json").read_text())
    variables = template["variables"]["properties"]
    assert set(chosen) <= set(variables)
    values = {name: entry.get("default") for name, entry in variables.items()} | chosen
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(variables), "a variable without a place, or a place without a variable"
    return apply_values(template["job_configuration"], values)


def test_the_kubernetes_pool_renders_to_a_job_that_keeps_its_state_and_runs_without_root() -> None:
    job = rendered("kubernetes", name="relinearize", gpus=2, env={"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    assert "{{" not in json.dumps(job)
    manifest = job["job_manifest"]
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["namespace"]) == (
        "batch/v1",
        "Job",
        "lolcats",
    )
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    claimed = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claimed & {mount["name"] for mount in container["volumeMounts"]}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["restartPolicy"] == "Never"
    assert manifest["spec"]["backoffLimit"] == 0  # Prefect tries again, not Kubernetes behind its back


def test_the_docker_pool_renders_with_prefect_s_own_templating() -> None:
    job = rendered("docker", name="linearize", env={"A": "b"})
    assert "{{" not in json.dumps(job)
    assert job["env"] == {"A": "b"}
    assert job["volumes"] == ["lolcats_worker:/home/lolcats/project"]


@pytest.mark.parametrize("deployment", PREFECT["deployments"], ids=lambda d: d["entrypoint"].rpartition(":")[2])
def test_every_deployment_names_a_flow_that_exists(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]), use_placeholder_flow=False)
    assert flow.name == deployment["entrypoint"].rpartition(":")[2]
    assert deployment["work_pool"]["name"] == "lolcats"


def test_the_nightly_run_has_a_schedule_an_event_and_one_slot() -> None:
    (nightly,) = [entry for entry in PREFECT["deployments"] if entry["name"] == "nightly"]
    assert nightly["schedules"][0]["cron"] == "0 3 * * *"
    assert "lolcats.drift" in nightly["triggers"][0]["expect"]
    assert nightly["concurrency_limit"]["limit"] == 1


def test_a_run_that_finds_its_place_taken_waits_and_is_not_cancelled() -> None:
    limits = [entry["concurrency_limit"] for entry in PREFECT["deployments"] if "concurrency_limit" in entry]
    assert [limit["collision_strategy"] for limit in limits] == ["ENQUEUE"] * 2


@pytest.mark.parametrize("name", SERVICES)
def test_composed_services_listen_on_this_machine_only_and_hold_no_secret(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert re.search(r":[\w.-]+$", service["image"]), "an image without a version"
    for key, value in (service.get("environment") or {}).items():
        if re.search("PASSWORD|SECRET|KEY|AUTH|CONNECTION", key):
            assert re.search(r"\$\{\w+:\?", str(value)), f"{key} must come from the environment"


def test_what_the_composition_refers_to_exists() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on") or []) <= set(SERVICES)
        for volume in service.get("volumes") or []:
            source = volume.partition(":")[0]
            assert (ROOT / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]
    assert (ROOT / SERVICES["worker"]["build"]["dockerfile"]).is_file()
    created = (ROOT / "deploy" / "postgres-databases.sql").read_text()
    for database in ("prefect", "mlflow"):
        assert f"CREATE DATABASE {database};" in created


def test_a_run_that_ended_under_any_name_is_no_zombie_and_a_webhook_is_used_only_where_there_is_one() -> None:
    deployment, block = uuid.uuid4(), uuid.uuid4()
    zombies, never_begun, resume = automations(deployment, None)
    for gone in (zombies, never_begun):
        assert gone.trigger.expect == {"prefect.flow-run.*"}  # Promoted, UpToDate and Refused among them
    assert zombies.trigger.within < never_begun.trigger.within
    assert resume.actions[0].deployment_id == deployment
    (notify,) = automations(deployment, block)[3:]
    assert isinstance(notify.actions[0], CallWebhook)
    assert "{{ flow_run.state.message }}" in str(notify.actions[0].payload)
    assert {"prefect.flow-run.Failed", "prefect.flow-run.Refused"} <= notify.trigger.expect

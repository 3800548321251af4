"""What Prefect does by itself: ``python -m flows.automations`` brings its automations to the state described here.

A flow run whose heartbeat stops, or that was handed to a worker and never begins, is a zombie (its worker or machine is
gone): it is marked as crashed, and a crashed re-linearization is started again with the parameters it had, which
continues from the last checkpoint (`relinearize.RESTARTS` times in a row). With `LOLCATS_WEBHOOK_URL`, every failure
and refusal is posted there (the body: `MESSAGE`). The address is kept in a Prefect block, encrypted, never in a log.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from pydantic import SecretStr

WEBHOOK_VARIABLE = "LOLCATS_WEBHOOK_URL"
BLOCK = "lolcats-notifications"
ZOMBIE_AFTER = timedelta(seconds=100)  # three heartbeats of 30 s, and some time for the way
MESSAGE = {
    "text": "{{ flow_run.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message }}",
    "flow_run_id": "{{ flow_run.id }}",
}
# What a crashed run was asked for, and how often its work was started again.
ASKED = {
    "preset": "{{ flow_run.parameters.preset | default(none) | tojson }}",
    "set": "{{ flow_run.parameters.set | default(none) | tojson }}",
    "restarts": "{{ flow_run.parameters.restarts | default(0) + 1 }}",
}
BEGINS_WITHIN = timedelta(minutes=15)  # an image may have to be fetched first
_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})


def automations(deployment_id: UUID, block_id: UUID | None) -> list[AutomationCore]:
    """The automations. `deployment_id`: of relinearize/nightly; `block_id`: of the webhook where there is one."""
    found = [
        _gone("zombies", "prefect.flow-run.heartbeat", ZOMBIE_AFTER, "Its heartbeat stopped."),
        _gone("never begun", "prefect.flow-run.Pending", BEGINS_WITHIN, "It never began."),
        AutomationCore(
            name="lolcats: resume",
            description="A crashed re-linearization is started again and continues from the last checkpoint.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Crashed"},
                match=_RUN,
                match_related=ResourceSpecification({"prefect.resource.id": f"prefect.deployment.{deployment_id}"}),
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=deployment_id,
                    parameters={name: _rendered(template) for name, template in ASKED.items()},
                    job_variables=None,
                )
            ],
        ),
    ]
    if block_id is not None:
        names = {f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "Refused")}
        found.append(
            AutomationCore(
                name="lolcats: notify",
                description="Failures, crashes and refused versions go to the webhook.",
                trigger=EventTrigger(expect=names, match=_RUN, posture=Posture.Reactive, threshold=1),
                actions=[CallWebhook(block_document_id=block_id, payload=json.dumps(MESSAGE))],
            )
        )
    return found


def _rendered(template: str) -> dict[str, Any]:
    """A parameter whose JSON Prefect makes from a template."""
    return {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": template}}


def _gone(name: str, after: str, within: timedelta, message: str) -> AutomationCore:
    """Mark a flow run as crashed when nothing is heard of it for some time after an event."""
    return AutomationCore(
        name=f"lolcats: {name}",
        description="A flow run that nothing is heard of is marked as crashed.",
        trigger=EventTrigger(
            after={after},
            expect={"prefect.flow-run.*"},  # a further heartbeat, or any state, whatever its name
            match=_RUN,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message, force=False)],
    )


def main() -> None:
    """Create or replace the automations on the server that `PREFECT_API_URL` names."""
    block_id: UUID | None = None
    if url := os.environ.get(WEBHOOK_VARIABLE):
        block_id = cast(UUID, Webhook(method="POST", url=SecretStr(url)).save(BLOCK, overwrite=True))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("relinearize/nightly")
        existing = {found.name: found for found in client.read_automations()}
        for wanted in automations(deployment.id, block_id):
            client.create_automation(wanted)
            if wanted.name in existing:
                client.delete_automation(existing[wanted.name].id)


if __name__ == "__main__":
    main()

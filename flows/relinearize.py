"""The Prefect flows `relinearize` (a new student when something changed) and `drift` (an event when text changed)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.events import emit_event
from prefect.states import Completed

from flows import project_root, without_secrets
from flows.delivery import PATIENT, show
from flows.linearize import pipeline
from lolcats_common.errors import UserError
from lolcats_common.params import Params, load_params
from lolcats_common.secrets import redacted
from tasks.operations import relinearization
from tasks.versioning import confinement, worktrees

if TYPE_CHECKING:
    from tasks.operations.drift import Drift

DRIFT_EVENT = "lolcats.drift"
RESTARTS = 10  # in a row, each after a crash
_prepare = task(name="prepare worktree", task_run_name="prepare worktree", **PATIENT)(
    without_secrets(relinearization.prepare)
)
_changes = task(name="find changes", task_run_name="find changes", **PATIENT)(without_secrets(relinearization.changes))
_commit = task(name="commit dvc.lock", task_run_name="commit dvc.lock", **PATIENT)(
    without_secrets(relinearization.commit)
)


@task(name="measure drift", task_run_name="measure drift", **PATIENT)
@without_secrets
def _measure(root: Path, params: Params) -> Drift:
    from tasks.operations import drift as drifting

    return drifting.measure(root, params)


def _called() -> str:
    """The flow run's name: what it was asked for, and when."""
    asked = runtime.flow_run.parameters
    label = worktrees.label(asked.get("preset"), asked.get("set"))
    return redacted(f"relinearize {label or 'params.yaml'}, {datetime.now(UTC):%Y-%m-%d %H:%M}")


@flow(name="relinearize", flow_run_name=_called, validate_parameters=False)
@without_secrets
def relinearize(preset: str | None = None, set: dict[str, Any] | None = None, restarts: int = 0) -> Any:
    """Make, examine and promote a new student if code, parameters, teacher or text changed; else end as up to date.

    Ends as ``UpToDate``, ``Promoted`` or, with the reasons, ``Refused``; then the champion stays.

    Args:
        restarts: how often this work was started again by itself because it crashed.

    Raises:
        UserError: it crashed too often, parameters are wrong, a stage failed, or the registry cannot be used.
    """
    root, log = project_root(), get_run_logger()
    if restarts > RESTARTS:
        raise UserError(f"given up after {RESTARTS} restarts, each of which crashed; look at them and start it by hand")
    if runtime.deployment.id:
        confinement.check_allowed(root, preset, set)
    worktree = _prepare(root, preset, set)
    found = _changes(root, worktree)
    if not found:
        log.info("Nothing changed since the last result.")
        return Completed(name="UpToDate", message="nothing changed since the last result")
    show(_page(found), "changes", "What changed since the last result")

    def keep(version: str) -> None:
        _commit(root, worktree, version, found)

    result = pipeline(root, relinearization.NAME, worktree, promote=True, keep=keep)
    registered, gates = result["registered"], result["gates"]
    assert registered is not None
    assert gates is not None
    version = registered["version"]
    if not gates["passed"]:
        message = redacted(f"version {version} is refused, the champion stays: {gates['reasons']}")
        log.warning(message)
        return Completed(name="Refused", message=message)
    return Completed(name="Promoted", message=f"version {version} is the champion")


def _page(found: dict[str, list[str]]) -> str:
    return "# What changed\n\n" + "".join(f"- {stage}: {'; '.join(why)}\n" for stage, why in found.items())


@flow(name="drift", flow_run_name=lambda: f"drift {datetime.now(UTC):%Y-%m-%d}")
@without_secrets
def drift() -> str:
    """Measure the champion on recent text; above `relinearize.max_drift`, the event ``lolcats.drift`` is emitted.

    Raises:
        UserError: there is no champion or no recent text.
    """
    root = project_root()
    params = load_params(root / "params.yaml")
    found = _measure(root, params)
    if found.drifted:
        emit_event(
            event=DRIFT_EVENT,
            resource={"prefect.resource.id": f"lolcats.model.{params.register.name}"},
            payload={"version": found.version, "recent": found.recent, "validation": found.validation},
        )
    get_run_logger().info(str(found))
    return str(found)

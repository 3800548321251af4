"""The Prefect tasks behind the stages: register, gates, promote; tried again where the outside does not answer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException
from prefect.states import State

from flows import without_secrets
from lolcats_common.errors import Unavailable
from lolcats_common.params import GatesParams, Params
from lolcats_common.secrets import redacted
from tasks.registry import promotion, register
from tasks.registry.versions import VersionStatus
from tasks.runner.mlflow_run import first_line

logger = logging.getLogger(__name__)


def _can_help(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether trying again can help: only where something outside did not answer."""
    if isinstance(state.data, Unavailable):
        logger.warning("%s; trying again", state.data)
        return True
    return False


# Five minutes in all: a server that was killed is back by then on a busy machine too, whatever its clients wait for.
DELAYS = [2, 4, 8, 16, *[30] * 9]
PATIENT: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": len(DELAYS),
    "retry_delay_seconds": DELAYS,
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": _can_help,
}


def show(page: str, key: str, description: str) -> None:
    """A page in Prefect's UI. Without it the run goes on: MLflow and the registry hold what it says."""
    try:
        create_markdown_artifact(redacted(page), key=key, description=description)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("Prefect's server did not take the page %r: %s", key, first_line(error))


@task(name="register", task_run_name="register", **PATIENT)
@without_secrets
def register_model(root: Path, params: Params, run_id: str) -> register.RegisteredVersion:
    """Register the finetuned model unless this very model is registered already."""
    return register.register(root, params, run_id)


@task(name="gates", task_run_name="gates", **PATIENT)
@without_secrets
def run_gates(root: Path, name: str, gates: GatesParams, version: str) -> VersionStatus:
    """Run the gates on a version; one that passes becomes the challenger. The report is a Prefect artifact too."""
    report, status = promotion.run_gates(root, name, gates, version)
    show(report.markdown(), "gates", f"Gates of {name} version {version}")
    return status


@task(name="promote", task_run_name="promote", **PATIENT)
@without_secrets
def promote_version(root: Path, name: str, version: str) -> VersionStatus:
    """Make a version that passed its gates the champion."""
    return promotion.promote(root, name, version)


@task(name="rollback", task_run_name="rollback", **PATIENT)
@without_secrets
def roll_back(root: Path, name: str) -> tuple[str, str]:
    """Let the previous champion serve again."""
    return promotion.rollback(root, name)

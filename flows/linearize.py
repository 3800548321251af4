"""The Prefect flow `linearize`: one task per stage of dvc.yaml, then registration, the gates and the summary.

Names and order only: DVC decides what has to run, `tasks` does it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE

from flows import project_root, without_secrets
from flows.delivery import promote_version, register_model, run_gates, show
from lolcats_common.machine import device_tags
from lolcats_common.params import GatesParams, read_assignments
from lolcats_common.records import Summary
from lolcats_common.secrets import redacted
from tasks.cli.options import changed_params
from tasks.registry.promotion import CHAMPION
from tasks.registry.register import RegisteredVersion
from tasks.registry.versions import VersionStatus, version_status
from tasks.reporting import descriptions, summary
from tasks.runner.exits import raise_terminated, run_and_report
from tasks.runner.logs import setup_logging
from tasks.runner.mlflow_run import FLOW_TAG, NOTE, PARENT_VARIABLE, Run, close_abandoned, connect, first_line
from tasks.runner.processes import exit_with_supervisor
from tasks.runner.servers import require_answer
from tasks.versioning import confinement, dvc_graph, worktrees

logger = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE)
@without_secrets
def _run_stage(stage: str, root: Path, environment: dict[str, str]) -> dvc_graph.Reproduced:
    """Bring one stage up to date; its output goes to the terminal, or to the flow's log where that is read."""
    log = get_run_logger()
    on_line = log.info if log.isEnabledFor(logging.INFO) else None
    return dvc_graph.repro(stage, root, environment, on_line)


def stage_tasks(root: Path) -> dict[str, Task[..., dvc_graph.Reproduced]]:
    """One Prefect task per stage of dvc.yaml, by name, in topological order."""
    return {name: _run_stage.with_options(name=name, task_run_name=name) for name in dvc_graph.stages(root)}


def _called() -> str:
    """The flow run's name: what it was asked for."""
    asked = runtime.flow_run.parameters
    return redacted(f"linearize {worktrees.label(asked.get('preset'), asked.get('set'))}".strip())


@flow(name="linearize", flow_run_name=_called, validate_parameters=False)
@without_secrets
def linearize(preset: str | None = None, set: dict[str, Any] | None = None, register: bool = True) -> Summary:
    """Linearize, evaluate and register the teacher of params.yaml, or of `preset` with the overrides `set`.

    Overrides run in a worktree of their own (`tasks.versioning.worktrees`) and end as a DVC experiment. Returns the
    summary that reports/summary.json holds.

    Raises:
        UserError: parameters are wrong, a stage failed, or the model could not be registered.
    """
    root = project_root()
    if runtime.deployment.id:
        confinement.check_allowed(root, preset, set)
    return pipeline(root, "linearize", worktrees.workplace(root, preset, set), register=register)


def pipeline(
    root: Path,
    name: str,
    worktree: worktrees.Worktree,
    *,
    register: bool = True,
    promote: bool = False,
    keep: Callable[[str], object] = lambda version: None,
) -> Summary:
    """Every stage, then registration, the gates and, with `promote`, the change of champion; returns the summary.

    Args:
        name: of the MLflow run.
        keep: called with the number of the registered version, before its gates.

    Raises:
        UserError: as `linearize`.
    """
    close_abandoned(root, name)
    with _parent_run(root, name, worktree) as parent:
        stages = run_stages(worktree, parent)
        version = register_model(worktree.root, worktree.params, parent.id) if register else None
        status = None
        if version:
            keep(version.version)
            status = deliver(root, version, worktree.params.gates, promote)
        return summarize(root, name, worktree, parent, stages, version, status)


def run_stages(worktree: worktrees.Worktree, parent: Run) -> list[dvc_graph.Reproduced]:
    """Bring every stage up to date, one after the other, and save the result of overrides as a DVC experiment."""
    environment = {**worktree.environment, PARENT_VARIABLE: parent.id}
    stages = [stage(name, worktree.root, environment) for name, stage in stage_tasks(worktree.root).items()]
    worktrees.save(worktree)
    return stages


def deliver(root: Path, version: RegisteredVersion, gates: GatesParams, promote: bool) -> VersionStatus:
    """Run a version's gates where they have not run and, with `promote`, make it the champion if it passed them.

    With `promote` the gates of any version but the champion run again: the champion they compare with may be another.
    """
    status = version_status(root, version.name, version.version)
    if status.passed is None or (promote and CHAMPION not in status.aliases):
        status = run_gates(root, version.name, gates, version.version)
    if promote and status.passed:
        status = promote_version(root, version.name, version.version)
    return status


def summarize(
    root: Path,
    name: str,
    worktree: worktrees.Worktree,
    parent: Run,
    stages: Sequence[dvc_graph.Reproduced],
    version: RegisteredVersion | None,
    status: VersionStatus | None,
) -> Summary:
    """Write the summary of a finished run into reports/, to MLflow and to Prefect."""
    result = summary.build(worktree.root, stages, version, parent.id, worktree.name, status)
    page = summary.markdown(result)
    parent.log_metrics(summary.headline(result))
    for split, digest, profile in descriptions.datasets(worktree.root):
        parent.log_dataset(split, worktree.params.data.source, digest, split, profile)
    parent.log_text(page, "summary.md")
    said = descriptions.run(worktree.params, worktree.label)
    parent.describe(f"{said}\n\n{page}", descriptions.named(f"{name} {worktree.label}".strip(), result))
    show(page, "summary", "Teacher beside student")
    summary.write(root, result)
    return result


@contextmanager
def _parent_run(root: Path, name: str, worktree: worktrees.Worktree) -> Iterator[Run]:
    """The MLflow run that the stages' runs hang from; ends as FAILED or KILLED where the block does not end well."""
    tags = {FLOW_TAG: name, NOTE: descriptions.run(worktree.params, worktree.label), **device_tags()}
    tags |= {"dvc.experiment": worktree.name} if worktree.name else {}
    parent = Run.start(root, f"{name} {worktree.label}".strip(), params=worktree.params, tags=tags)
    try:
        yield parent
    except Exception as error:
        parent.finish("FAILED", first_line(error))
        raise
    except BaseException:
        parent.finish("KILLED")
        raise
    parent.finish()


def main() -> None:
    """Run the flow with the command line's options in this process, print the table and exit as `lolcats run` does.

    What this machine can tell to be wrong is refused before the flow begins, so that it leaves no run behind.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.linearize", description=linearize.__doc__)
    parser.add_argument("--preset")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-register", dest="register", action="store_false")
    options = parser.parse_args()
    setup_logging()
    exit_with_supervisor()
    signal.signal(signal.SIGTERM, raise_terminated)

    def work() -> None:
        from tasks.runner import preflight  # loads torch and transformers

        root = project_root()
        preflight.check_run(changed_params(root, options.preset, options.set), root)
        if server := os.environ.get("PREFECT_API_URL"):
            require_answer("Prefect", server, "PREFECT_API_URL", "the run then has a server of its own")
        connect(root)
        summary.show(linearize(options.preset, read_assignments(options.set) or None, options.register))

    sys.exit(run_and_report(work, "lolcats"))


if __name__ == "__main__":
    main()

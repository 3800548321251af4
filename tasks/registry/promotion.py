"""Which version serves: the aliases ``candidate → challenger → champion`` and ``previous``, and the gates between them.

`run_gates` makes a version that passes the challenger; `promote` makes it the champion and the champion before it the
previous one; `rollback` swaps these two. Two aliases cannot be moved at once, so a tag of the
registered model says first where both are going, and whoever comes next completes a move that was cut short.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from lolcats_common.errors import UserError, shown
from lolcats_common.params import GatesParams
from tasks.registry.gates import PROBED, GateReport, evaluate_gates
from tasks.registry.versions import (
    GATES_TAG,
    REASONS_TAG,
    VersionStatus,
    alias_version,
    find_version,
    mlflow_errors_as_unavailable,
    read_evaluation,
    read_status,
    require_complete,
    stored_model,
)
from tasks.runner.mlflow_run import connect

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
MOVE_TAG = "move"
PROBE_SECONDS = 3600.0


def alias_lock(root: Path) -> FileLock:
    """A lock under which one process of this machine at a time moves aliases."""
    folder = root / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "lolcats-aliases.lock")


@mlflow_errors_as_unavailable
def set_tag(root: Path, name: str, version: str, key: str, value: str) -> None:
    """Set a tag of a version.

    Raises:
        Unavailable: the store cannot be used.
    """
    connect(root).set_model_version_tag(name, version, key, value)


@mlflow_errors_as_unavailable
def run_gates(root: Path, name: str, gates: GatesParams, which: str) -> tuple[GateReport, VersionStatus]:
    """Run the gates on a version, keep the report with it, and make it the challenger if it passes.

    The report is a tag of the version and, as gates/version-<number>.md and .json, an artifact of its run. The status
    is the version's afterwards.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version, its registration was cut short, or its files or the champion's are not
            those registered.
    """
    client = connect(root)
    version = require_complete(find_version(client, name, which))
    champion = alias_version(client, name, CHAMPION)
    if champion is not None and str(champion.version) == str(version.version):
        champion = None
    with stored_model(client, version) as stored:
        evaluation = read_evaluation(stored)
        wanted = any(getattr(gates, gate) != "disabled" for gate in PROBED)
        probe = _probe(stored) if wanted else None
    before = None
    if champion is not None:
        with stored_model(client, champion) as stored:
            before = read_evaluation(stored)
    number = str(version.version)
    compared = str(champion.version) if champion is not None else None
    report = GateReport(name, number, compared, evaluate_gates(gates, evaluation, before, probe))
    client.log_text(version.run_id, report.markdown(), f"gates/version-{number}.md")
    client.log_text(version.run_id, json.dumps(report.to_dict(), indent=2), f"gates/version-{number}.json")
    client.set_model_version_tag(name, number, REASONS_TAG, "; ".join(report.reasons) or "none")
    client.set_model_version_tag(name, number, GATES_TAG, "passed" if report.passed else "refused")
    if report.passed:
        with alias_lock(root):
            serving = alias_version(client, name, CHAMPION)
            if serving is None or str(serving.version) != number:
                client.set_registered_model_alias(name, CHALLENGER, number)
    return report, read_status(client, name, number)


@mlflow_errors_as_unavailable
def promote(root: Path, name: str, which: str = CHALLENGER) -> VersionStatus:
    """Make a version that passed its gates the champion; its status afterwards.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version, it did not pass its gates, or its files are not those registered.
    """
    client = connect(root)
    with alias_lock(root):
        _complete_move(client, name)
        version = require_complete(find_version(client, name, which))
        number = str(version.version)
        if version.tags.get(GATES_TAG) != "passed":
            reasons = version.tags.get(REASONS_TAG)
            raise UserError(
                f"{name} version {number} did not pass its gates: {reasons}"
                if reasons
                else f"{name} version {number} was not examined; run `lolcats gates {number}` first"
            )
        with stored_model(client, version):
            pass  # its files are those registered
        champion = alias_version(client, name, CHAMPION)
        if champion is None or str(champion.version) != number:
            _move(client, name, number, str(champion.version) if champion is not None else None)
        challenger = alias_version(client, name, CHALLENGER)
        if challenger is not None and str(challenger.version) == number:
            client.delete_registered_model_alias(name, CHALLENGER)
    return read_status(client, name, number)


@mlflow_errors_as_unavailable
def rollback(root: Path, name: str) -> tuple[str, str]:
    """Swap champion and previous champion; the numbers of the version that serves then and of the other.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no previous champion, or its files are not those that were registered.
    """
    client = connect(root)
    with alias_lock(root):
        _complete_move(client, name)
        champion, previous = alias_version(client, name, CHAMPION), alias_version(client, name, PREVIOUS)
        if champion is None or previous is None:
            raise UserError(f"{name} has no previous champion to go back to")
        with stored_model(client, previous):
            pass  # its files are those registered
        _move(client, name, str(previous.version), str(champion.version))
    return str(previous.version), str(champion.version)


def _move(client: Any, name: str, champion: str, previous: str | None) -> None:
    """Make `champion` the champion.

    Raises:
        UserError: a process of another machine, which `alias_lock` does not hold up, made another one it meanwhile.
    """
    client.set_registered_model_tag(name, MOVE_TAG, json.dumps({CHAMPION: champion, PREVIOUS: previous}))
    _complete_move(client, name)
    serving = alias_version(client, name, CHAMPION)
    if serving is None or str(serving.version) != champion:
        raise UserError(
            f"{name} version {champion} is not the champion: another machine moved the alias at the same time, to "
            f"version {serving and serving.version}; `lolcats promote {champion}` tries again"
        )


def _complete_move(client: Any, name: str) -> None:
    """Set the aliases as the tag of a move that was cut short says, if there is one."""
    from mlflow.exceptions import MlflowException

    try:
        going = client.get_registered_model(name).tags.get(MOVE_TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        raise
    if not going:
        return
    try:
        places = json.loads(going)
        moves = [(alias, str(places[alias])) for alias in (CHAMPION, PREVIOUS) if places[alias] is not None]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{name}: its tag `{MOVE_TAG}` must say where {CHAMPION} and {PREVIOUS} go, got {shown(going)}; delete the "
            "tag and promote again"
        ) from None
    for alias, number in moves:
        client.set_registered_model_alias(name, alias, number)
    client.delete_registered_model_tag(name, MOVE_TAG)


def _probe(stored: Path) -> dict[str, Any]:
    """What `tasks.registry.gate_probe` measures, in a process that sees neither the project nor the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    for name in ("PYTHONPATH", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="lolcats-probe-") as temporary:
        result = Path(temporary) / "probe.json"
        script = str(Path(__file__).with_name("gate_probe.py"))
        command = [sys.executable, "-I", "-B", script, str(stored), str(result)]
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/unused.db"
        try:
            done = subprocess.run(
                command, cwd=temporary, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS
            )
            return dict(json.loads(result.read_text(encoding="utf-8")))
        except subprocess.TimeoutExpired:
            return {"error": f"it took longer than {PROBE_SECONDS:.0f} s"}
        except (OSError, ValueError):
            lines = done.stderr.strip().splitlines()
            return {"error": f"loading ended with code {done.returncode}: {lines[-1] if lines else 'no message'}"}

"""Which version serves: the aliases ``candidate → challenger → champion`` and ``previous``, and the gates between them.

`examine` runs the gates and makes a version that passes the challenger; `promote` makes it the champion and the
champion before it the previous one; `rollback` swaps these two. Two aliases cannot be moved at once, so a tag of the
registered model says first where both are going, and whoever comes next completes a move that was cut short.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.params import GatesParams
from tasks.registry import register
from tasks.registry.gates import PROBED, GateReport, judge
from tasks.runner.mlflow_run import connect, first_line, is_missing

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
GATES_TAG, REASONS_TAG = "gates", "gates.reasons"
MOVE_TAG = "move"
PROBE_SECONDS = 3600.0


@dataclass(frozen=True)
class Standing:
    """What the registry says of a version. `passed`: None before its gates ran."""

    passed: bool | None
    reasons: str
    aliases: tuple[str, ...]


def _speaks_of_the_store(function: F) -> F:
    """An error of MLflow's becomes `Unavailable` in one line."""

    @wraps(function)
    def wrapped(root: Path, *arguments: Any, **options: Any) -> Any:
        try:
            return function(root, *arguments, **options)
        except UserError:
            raise
        except OSError as error:
            raise Unavailable(f"{function.__name__}: {error.strerror or first_line(error)}") from error
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException):
                raise
            raise Unavailable(f"{function.__name__}: MLflow failed: {first_line(error)}") from error

    return wrapped  # type: ignore[return-value]


def _alias_lock(root: Path) -> FileLock:
    """A lock under which one process of this machine at a time moves aliases."""
    folder = root / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "lolcats-aliases.lock")


def alias_version(client: Any, name: str, alias: str) -> Any:
    """The version that an alias names; None where the alias or the model does not exist."""
    return _found(client.get_model_version_by_alias, name, alias)


def _found(ask: Callable[..., Any], *what: str) -> Any:
    """What MLflow answers; None where it says that there is no such thing, `Unavailable` where it does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        return ask(*what)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise Unavailable(f"MLflow failed: {first_line(error)}") from error


def find_version(client: Any, name: str, which: str) -> Any:
    """A version by number or alias.

    Raises:
        Unavailable: the store does not answer.
        UserError: there is none.
    """
    found = _found(client.get_model_version if which.isdigit() else client.get_model_version_by_alias, name, which)
    if found is None:
        raise UserError(f"{name} has no version or alias {which!r}; `lolcats status` lists them")
    return found


@_speaks_of_the_store
def standing(root: Path, name: str, which: str) -> Standing:
    """Whether a version passed its gates, why not, and the aliases it has.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version.
    """
    version = find_version(connect(root), name, which)
    gates, reasons = version.tags.get(GATES_TAG), version.tags.get(REASONS_TAG, "")
    return Standing(None if gates is None else gates == "passed", reasons, tuple(sorted(version.aliases)))


@_speaks_of_the_store
def set_tag(root: Path, name: str, version: str, key: str, value: str) -> None:
    """Set a tag of a version.

    Raises:
        Unavailable: the store cannot be used.
    """
    connect(root).set_model_version_tag(name, version, key, value)


@_speaks_of_the_store
def examine(root: Path, name: str, gates: GatesParams, which: str) -> GateReport:
    """Run the gates on a version, keep the report with it, and make it the challenger if it passes.

    The report is a tag of the version and, as gates/version-N.md and .json, an artifact of its run.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version, or its registration was cut short.
    """
    client = connect(root)
    version = _whole(find_version(client, name, which))
    champion = alias_version(client, name, CHAMPION)
    if champion is not None and str(champion.version) == str(version.version):
        champion = None
    with register.stored_model(client, version) as stored:
        register.check_bytes(version, stored)
        evaluation = read_evaluation(stored)
        wanted = any(getattr(gates, gate) != "disabled" for gate in PROBED)
        probe = _probe(stored) if wanted else None
    before = None
    if champion is not None:
        with register.stored_model(client, champion) as stored:
            before = read_evaluation(stored)
    number = str(version.version)
    compared = str(champion.version) if champion is not None else None
    report = GateReport(name, number, compared, judge(gates, evaluation, before, probe))
    client.log_text(version.run_id, report.markdown(), f"gates/version-{number}.md")
    client.log_text(version.run_id, json.dumps(report.to_dict(), indent=2), f"gates/version-{number}.json")
    client.set_model_version_tag(name, number, REASONS_TAG, "; ".join(report.reasons)[:5000] or "none")
    client.set_model_version_tag(name, number, GATES_TAG, "passed" if report.passed else "refused")
    if report.passed:
        with _alias_lock(root):
            serving = alias_version(client, name, CHAMPION)
            if serving is None or str(serving.version) != number:
                client.set_registered_model_alias(name, CHALLENGER, number)
    return report


@_speaks_of_the_store
def promote(root: Path, name: str, which: str = CHALLENGER) -> str:
    """Make a version that passed its gates the champion; the number of the version that serves then.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version, it did not pass its gates, or its files are not those registered.
    """
    client = connect(root)
    with _alias_lock(root):
        _complete_move(client, name)
        version = _whole(find_version(client, name, which))
        number = str(version.version)
        if version.tags.get(GATES_TAG) != "passed":
            reasons = version.tags.get(REASONS_TAG)
            raise UserError(
                f"{name} version {number} did not pass its gates: {reasons}"
                if reasons
                else f"{name} version {number} was not examined; run `lolcats gates {number}` first"
            )
        with register.stored_model(client, version) as stored:
            register.check_bytes(version, stored)
        champion = alias_version(client, name, CHAMPION)
        if champion is None or str(champion.version) != number:
            _move(client, name, number, str(champion.version) if champion is not None else None)
        challenger = alias_version(client, name, CHALLENGER)
        if challenger is not None and str(challenger.version) == number:
            client.delete_registered_model_alias(name, CHALLENGER)
    return number


@_speaks_of_the_store
def rollback(root: Path, name: str) -> tuple[str, str]:
    """Let the previous champion serve again, which the present one then is; the numbers of both.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no previous champion, or its files are not those that were registered.
    """
    client = connect(root)
    with _alias_lock(root):
        _complete_move(client, name)
        champion, previous = alias_version(client, name, CHAMPION), alias_version(client, name, PREVIOUS)
        if champion is None or previous is None:
            raise UserError(f"{name} has no previous champion to go back to")
        with register.stored_model(client, previous) as stored:
            register.check_bytes(previous, stored)
        _move(client, name, str(previous.version), str(champion.version))
    return str(previous.version), str(champion.version)


def _move(client: Any, name: str, champion: str, previous: str | None) -> None:
    client.set_registered_model_tag(name, MOVE_TAG, json.dumps({CHAMPION: champion, PREVIOUS: previous}))
    _complete_move(client, name)


def _complete_move(client: Any, name: str) -> None:
    """Bring the aliases where the tag says they were going; nothing to do where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        going = client.get_registered_model(name).tags.get(MOVE_TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        raise
    if not going:
        return
    for alias, number in json.loads(going).items():
        if number is not None:
            client.set_registered_model_alias(name, alias, number)
    client.delete_registered_model_tag(name, MOVE_TAG)


def _whole(version: Any) -> Any:
    if version.tags.get(register.COMPLETE) != "complete":
        raise UserError(
            f"{version.name} version {version.version}: its registration was cut short; `lolcats register` completes it"
        )
    return version


def read_evaluation(stored: Path) -> dict[str, Any]:
    """The evaluation.json that was registered with a version.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return dict(json.loads((stored / "artifacts" / "evaluation.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"the version holds no readable evaluation.json: {first_line(error)}") from None


def _probe(stored: Path) -> dict[str, Any]:
    """What `tasks.registry.gate_probe` measures, in a process that sees neither the project nor the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    for name in ("PYTHONPATH", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="lolcats-probe-") as temporary:
        result = Path(temporary) / "probe.json"
        script = str(Path(__file__).with_name("gate_probe.py"))
        command = [sys.executable, "-I", script, str(stored), str(result)]
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

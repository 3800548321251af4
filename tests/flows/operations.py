"""A project whose text lies outside it, and the servers of `make serve` on free ports for it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tasks.operations import services
from tests.conftest import ROOT, fake_dvc, run_git
from tests.tasks.processes import wait_for

# Real servers, but no waiting for the next round of a loop.
QUICK = {
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "3",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


def operate(project: Path) -> Path:
    """Make `project` depend on data.txt beside it, which holds the perplexity that its student gets; that file."""
    data = project.parent / "data.txt"
    data.write_text("12.0")
    copy = f"mkdir -p outputs/inputs && cp {data} outputs/inputs/data.txt && echo {{}} > outputs/inputs/metrics.json"
    outside = {"cmd": copy, "meta": {"outside": True}}
    finetune = {"deps": ["stages/fake.py", "outputs/inputs/data.txt"]}
    dvc = fake_dvc("inputs", "finetune", "evaluate", inputs=outside, finetune=finetune)
    (project / "dvc.yaml").write_text(dvc)
    run_git(project, "commit", "--all", "--quiet", "--message", "operated")
    return data


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Processes in the project find the library without what its package imports: transformers, seconds of work each time.
LIGHT = '"""The library\'s modules without those that its package imports."""\n\n__path__ = [{library!r}]\n'
OVER = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


class Servers:
    """`make serve` and `make stop` for a project, and the little of Prefect's API that a test needs.

    Everything is waited for until it is there, or until `gone` says that it cannot come any more.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self.variables: dict[str, str] = {}
        self.absent: set[str] = set()  # servers that a test ended itself
        self._deployments: dict[str, str] = {}

    def serve(self) -> None:
        """`make serve`: start what does not run."""
        self._services("serve")
        lines = (self.root / ".prefect" / "services.env").read_text().splitlines()
        self.variables = dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def bring_back(self) -> None:
        """`make serve` again, which starts what is gone; in this process, which saves seconds of imports."""
        with mock.patch.dict(os.environ, self.environment):
            services.start(self.root)
        self.absent = set()

    def stop(self) -> None:
        """`make stop`."""
        self._services("stop")

    def _services(self, action: str) -> None:
        command = [sys.executable, "-m", "tasks.cli.main", action]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A module of this Python in the project, as a person calls it after `. .prefect/services.env`."""
        environment = {**self.environment, **self.variables}
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env=environment, capture_output=True, text=True
        )

    def gone(self) -> str:
        """Which servers ended although nobody ended them, and the last that they said."""
        gone = set(services.SERVICES) - set(services._running(self.root)) - self.absent
        return "\n".join(f"{name} ended: {self.log(name)[-2000:]}" for name in sorted(gone))

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something that the servers bring about; asked for twice a second, for they have other work."""
        wait_for(condition, what, self.gone, pause=0.5)

    def api(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """One call of Prefect's API, which must mean the same when it is made twice.

        It is made again where the server is too busy for its database (503) or for an answer, or is just coming up.
        """
        headers = {"Content-Type": "application/json"}
        if login := self.variables.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.variables['PREFECT_API_URL']}{path}", data, headers, method=method)
        answers: list[Any] = []

        def answered() -> bool:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    answers.append(json.loads(answer.read() or "null"))
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            except (OSError, http.client.HTTPException):
                pass
            return bool(answers)

        self.wait(answered, f"an answer of Prefect's server to {path}")
        return answers[0]

    def deployment(self, name: str) -> str:
        """The id of a deployment."""
        if name not in self._deployments:
            self._deployments[name] = str(self.api(f"/deployments/name/{name}")["id"])
        return self._deployments[name]

    def schedule(self, name: str, schedule: dict[str, Any]) -> None:
        """Give a deployment this schedule instead of those that it has."""
        body = {"schedules": [{"active": True, "schedule": schedule}]}
        self.api(f"/deployments/{self.deployment(name)}", body, "PATCH")

    def run(self, name: str, **parameters: Any) -> str:
        """Start a deployment; the id of its flow run."""
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters, "idempotency_key": str(uuid.uuid4())}
        return str(self.api(f"/deployments/{self.deployment(name)}/create_flow_run", body)["id"])

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment, oldest first; those that only a schedule plans left out."""
        chosen = {"deployments": {"id": {"any_": [self.deployment(name)]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.api("/flow_runs/filter", chosen)
        return [run for run in found if run["state_name"] != "Scheduled"]

    def ended(self, run: str) -> dict[str, Any]:
        """The state in which a flow run ended."""
        state: dict[str, Any] = {}

        def over() -> bool:
            nonlocal state
            state = self.api(f"/flow_runs/{run}")["state"]
            return state["type"] in OVER

        self.wait(over, f"the end of flow run {run}")
        return state

    def new_run(self, name: str, known: int) -> str:
        """The flow run that comes after the first `known` ones."""
        self.wait(lambda: len(self.runs(name)) > known, f"a new run of {name}")
        return str(self.runs(name)[known]["id"])

    def log(self, name: str = "worker") -> str:
        """A server's log, for messages of failing tests."""
        return (self.root / ".prefect" / f"{name}.log").read_text(errors="replace")


def deployable(root: Path) -> None:
    """Give a project this checkout's flows and deployments."""
    (root / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
    if not (root / "flows").exists():
        (root / "flows").symlink_to(ROOT / "flows")
    if not (root / "lolcats_core").exists():
        (root / "lolcats_core.py").write_text(LIGHT.format(library=str(ROOT / "lolcats_core")))


@contextlib.contextmanager
def serving(root: Path, **more: str) -> Iterator[Servers]:
    """`make serve` for `root` on free ports, and `make stop` at the end."""
    deployable(root)
    environment = {**os.environ, **QUICK, "LOLCATS_ROOT": str(root), "PREFECT_HOME": str(root / ".prefect"), **more}
    environment |= {"LOLCATS_PREFECT_PORT": str(free_port()), "LOLCATS_MLFLOW_PORT": str(free_port())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    servers = Servers(root, environment)
    servers.serve()
    try:
        yield servers
    finally:
        servers.stop()

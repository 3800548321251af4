"""A project whose text lies outside it, and the servers of `make serve` on free ports for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tasks.operations import services
from tests.conftest import ROOT, fake_dvc, run_git
from tests.tasks.processes import wait_for

# Real servers, but no waiting for the next round of a loop.
QUICK = {
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


class Servers:
    """`make serve` and `make stop` for a project, and the little of Prefect's API that a test needs."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self.variables: dict[str, str] = {}

    def serve(self) -> None:
        """`make serve`: start what does not run."""
        self._services("start")
        lines = (self.root / ".prefect" / "services.env").read_text().splitlines()
        self.variables = dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def bring_back(self) -> None:
        """`make serve` again, which starts what is gone; in this process, which saves seconds of imports."""
        with mock.patch.dict(os.environ, self.environment):
            services.start(self.root)

    def stop(self) -> None:
        """`make stop`."""
        self._services("stop")

    def _services(self, action: str) -> None:
        command = [sys.executable, "-m", "tasks.operations.services", action]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A module of this Python in the project, as a person calls it after `. .prefect/services.env`."""
        environment = {**self.environment, **self.variables}
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env=environment, capture_output=True, text=True
        )

    def api(self, path: str, body: Any = None) -> Any:
        """One call of Prefect's API."""
        headers = {"Content-Type": "application/json"}
        if login := self.variables.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.variables['PREFECT_API_URL']}{path}", data, headers)
        for attempt in range(5):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 4:  # Prefect's way to say that its database is busy
                    raise
            time.sleep(1 + attempt)

    def deployment(self, name: str) -> str:
        """The id of a deployment."""
        return str(self.api(f"/deployments/name/{name}")["id"])

    def run(self, name: str, **parameters: Any) -> str:
        """Start a deployment; the id of its flow run."""
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return str(self.api(f"/deployments/{self.deployment(name)}/create_flow_run", body)["id"])

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment, oldest first; those that only a cron schedule plans left out."""
        chosen = {"deployments": {"id": {"any_": [self.deployment(name)]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.api("/flow_runs/filter", chosen)
        return [run for run in found if run["state_name"] != "Scheduled"]

    def ended(self, run: str, seconds: float = 240) -> dict[str, Any]:
        """The state in which a flow run ended."""
        state: dict[str, Any] = {}

        def over() -> bool:
            nonlocal state
            state = self.api(f"/flow_runs/{run}")["state"]
            return state["type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")

        wait_for(over, seconds, f"the end of flow run {run}")
        return state

    def new_run(self, name: str, known: int, seconds: float = 90) -> str:
        """The flow run that comes after the first `known` ones."""
        wait_for(lambda: len(self.runs(name)) > known, seconds, f"a new run of {name}")
        return str(self.runs(name)[known]["id"])

    def log(self) -> str:
        """The worker's log, for messages of failing tests."""
        return (self.root / ".prefect" / "worker.log").read_text()


@contextlib.contextmanager
def serving(root: Path, **more: str) -> Iterator[Servers]:
    """`make serve` for `root` on free ports, and `make stop` at the end."""
    (root / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
    if not (root / "flows").exists():
        (root / "flows").symlink_to(ROOT / "flows")
    environment = {**os.environ, **QUICK, "LOLCATS_ROOT": str(root), "PREFECT_HOME": str(root / ".prefect"), **more}
    environment |= {"LOLCATS_PREFECT_PORT": str(free_port()), "LOLCATS_MLFLOW_PORT": str(free_port())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    servers = Servers(root, environment)
    servers.serve()
    try:
        yield servers
    finally:
        servers.stop()

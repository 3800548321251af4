"""Runs over a real Prefect API with hostile overrides: one clear error each, and nothing is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows.linearize import linearize
from flows.relinearize import relinearize
from tests.flows.operations import free_port
from tests.tasks.processes import LAST_RESORT, wait_for
from tests.tasks.versioning.hostile import HOSTILE, PASSWORD

pytestmark = pytest.mark.slow


class Server:
    """A Prefect server of this test's own, and deployments without a worker: this process does what a worker would."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def deploy(self, flow: Any) -> str:
        """The id of a deployment whose parameters are held against the flow's, as `prefect deploy` makes it."""
        made = self.call("/flows/", {"name": flow.name})
        body = {"name": "api", "flow_id": made["id"], "enforce_parameter_schema": True}
        schema = parameter_schema(flow).model_dump()
        return str(self.call("/deployments/", {**body, "parameter_openapi_schema": schema})["id"])

    def run(self, flow: Any, deployment: str, **parameters: Any) -> Any:
        """The state in which a run ends."""
        made = self.call(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})
        with temporary_settings({PREFECT_API_URL: self.address}):
            with get_client(sync_client=True) as client:
                found = client.read_flow_run(UUID(made["id"]))
            return run_flow(flow, flow_run=found, return_type="state")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`prefect server start` on a free port; ended by its process."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    environment = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).status == 200
        except OSError:
            return False

    def ended() -> str:
        return (folder / "log").read_text()[-4000:] if process.poll() is not None else ""

    try:
        wait_for(answers, "Prefect's server", ended, pause=0.3)
        yield Server(f"http://127.0.0.1:{port}/api")
    finally:
        process.terminate()
        process.wait(LAST_RESORT)


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Every file of a project with its size and the time at which it changed."""
    return {
        str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


@pytest.fixture
def project(fake_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a way out of it, that this process works in."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in (outside, tmp_path):
        (folder / "secret.txt").write_text("secret")
    monkeypatch.setenv("HOME", str(outside))
    monkeypatch.setenv("LOLCATS_ROOT", str(fake_project))
    monkeypatch.chdir(fake_project)
    (fake_project / "link").symlink_to(outside)
    (fake_project / "a").mkdir()
    (fake_project / ".prefect").mkdir()
    (fake_project / ".prefect" / "login.txt").write_text("user:password")
    return fake_project


@pytest.mark.parametrize("flow", [linearize, relinearize], ids=lambda flow: flow.name)
def test_a_hostile_run_ends_in_one_clear_error_and_leaves_nothing(server: Server, project: Path, flow: Any) -> None:
    deployment, before = server.deploy(flow), everything(project)
    wrong = []
    given = HOSTILE if flow is linearize else HOSTILE[::6]
    for values, expected in given:
        try:
            state = server.run(flow, deployment, set=values)
            said = f"{state.name}: {state.message}"
            right = state.is_failed() and expected is not None and expected in said and len(said.splitlines()) == 1
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}"
            right = expected is None
        if not right or PASSWORD in said:
            wrong.append((values, said))
        if everything(project) != before:
            wrong.append((values, "something is left"))
            before = everything(project)
    for preset, said in (("../params", "unknown preset '../params'"), ({"a": 1}, "HTTP 409")):
        try:
            message = server.run(flow, deployment, preset=preset).message
        except urllib.error.HTTPError as error:
            message = f"HTTP {error.code}"
        if said not in message:
            wrong.append((preset, message))
    assert wrong == []
    assert everything(project) == before

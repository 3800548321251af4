"""A server that is down is said at once and with advice; one that asks for a login is there."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lolcats_common.errors import Unavailable
from tasks.cli.main import app
from tasks.runner import mlflow_run
from tasks.runner.servers import require_answer

NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def locked() -> Iterator[str]:
    """The address of a server that wants a login."""

    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_wants_a_login_is_there(locked: str) -> None:
    require_answer("MLflow", locked, "MLFLOW_TRACKING_URI", "")


@pytest.mark.parametrize("command", [["status"], ["lineage", "1"], ["gates"], ["promote"], ["rollback"]])
def test_a_command_says_at_once_that_mlflow_is_down_and_what_to_do(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(fake_project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.delenv(mlflow_run.RETRIES, raising=False)
    monkeypatch.setattr("tasks.versioning.dvc_graph.changed", lambda root, anew=False: {})
    import mlflow  # noqa: F401  (what it takes to import is not waited for a server)

    started = time.monotonic()
    result = CliRunner().invoke(app, command)
    assert time.monotonic() - started < 5
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line == (
        f"Error: MLflow at {NOBODY} does not answer (Connection refused); start it (`make serve`), correct "
        "MLFLOW_TRACKING_URI, or unset it: runs then go into mlflow.db here"
    )


def test_who_says_how_often_to_ask_is_not_turned_away_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setenv(mlflow_run.RETRIES, "0")
    with pytest.raises(Unavailable, match="cannot be used: API request"):
        mlflow_run.connect(tmp_path)

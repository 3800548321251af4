"""One served project for the tests of operation: starting servers takes longer than most of what they are asked."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_fake_project
from tests.flows.operations import Servers, operate, serving

LOGIN = "operator:a-password-for-tests"


@dataclass
class Operated:
    """A fake project with servers that ask for a login, its text, and what its webhook was sent."""

    root: Path
    data: Path
    servers: Servers
    webhook: str
    messages: list[dict[str, Any]]


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Operated]:
    """`make serve` with `LOLCATS_AUTH` and `LOLCATS_WEBHOOK_URL`."""
    root = make_fake_project(tmp_path_factory.mktemp("operated"))
    shutil.copy(empty_store, root / "mlflow.db")
    data, messages = operate(root), []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    webhook = f"http://127.0.0.1:{receiver.server_port}/a-secret-path"
    try:
        more = {"LOLCATS_AUTH": LOGIN, "LOLCATS_WEBHOOK_URL": webhook, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        with serving(root, **more) as servers:
            yield Operated(root, data, servers, webhook, messages)
    finally:
        receiver.shutdown()

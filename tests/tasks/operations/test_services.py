"""Servers for a person who looks have no worker, so that no schedule starts; one who serves then gets the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from tasks.operations import services

VARIABLES = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "PREFECT_API_URL": "http://127.0.0.1:2/api"}


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The modules that `start` called, with processes that only wait in place of the services'."""
    modules: list[str] = []
    launch = services._launch

    def waiting(root: Path, name: str, command: list[str], environment: Any) -> None:
        launch(root, name, [sys.executable, "-c", "import time; time.sleep(600)"], environment)

    def fresh(root: Path) -> dict[str, str]:
        text = "".join(f"export {name}={value}\n" for name, value in VARIABLES.items())
        services._private(root / services.VARIABLES, text)
        return dict(VARIABLES)

    monkeypatch.setattr(services, "_launch", waiting)
    monkeypatch.setattr(services, "_fresh", fresh)
    monkeypatch.setattr(services.new_store, "ensure", lambda database: None)
    monkeypatch.setattr(services, "_answers", lambda url: True)
    monkeypatch.setattr(services, "_call", lambda command, root, environment: modules.append(" ".join(command[2:])))
    yield modules
    services.stop(tmp_path)


def test_pages_need_no_worker_and_serving_after_it_deploys_once(tmp_path: Path, called: list[str]) -> None:
    said: list[str] = []
    pages = services.pages(tmp_path, said.append)
    assert pages == {"MLflow": "http://127.0.0.1:1", "Prefect": "http://127.0.0.1:2"}
    assert set(services._running(tmp_path)) == {"mlflow", "prefect"}
    assert called == []
    assert [line for line in said if "http://127.0.0.1:2 " in line]
    assert services.pages(tmp_path, said.append) == pages

    services.start(tmp_path, say=said.append)
    assert set(services._running(tmp_path)) == set(services.SERVICES)
    assert [call for call in called if "deploy --all" in call]
    known = len(called)
    worker = services._running(tmp_path)["worker"]
    worker.kill()
    worker.wait(30)
    services.start(tmp_path, say=said.append)  # what is gone is brought back; nothing is deployed again
    assert len(called) == known
    with pytest.raises(UserError, match="run already"):
        services.start(tmp_path)
    assert services.pages(tmp_path, said.append) == pages


def test_every_step_of_serving_is_said_before_it_is_waited_for(tmp_path: Path, called: list[str]) -> None:
    said: list[str] = []
    services.start(tmp_path, say=said.append)
    words = ("databases", "MLflow's server", "Prefect's server", "Deploying", "worker")
    assert [word for word, line in zip(words, said, strict=True) if word in line] == list(words)

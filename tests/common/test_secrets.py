"""No password and no token leaves this process: not in messages, error files, logs, tracebacks, tags or parameters."""

from __future__ import annotations

import base64
import html
import json
import logging
import sqlite3
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams, Params
from lolcats_common.secrets import MASK, keep_secrets, redacted
from tasks.runner import mlflow_run
from tasks.runner.mlflow_run import Run, first_line, tracking_uri
from tasks.runner.stage import execute

PASSWORD, TOKEN = "SUPERSECRETPW", "hf_averysecrettoken"


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    factory, hook, of_threads = logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "harmless")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # put back after what `tracking_uri` does
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    yield
    logging.setLogRecordFactory(factory)
    sys.excepthook, threading.excepthook = hook, of_threads


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://bob:{PASSWORD}@host:9/x", f"http://{MASK}@host:9/x"),
        (f"postgresql://bob:a@{PASSWORD}@host/db", f"postgresql://{MASK}@host/db"),
        (f"https://host/x?access_token={PASSWORD}&n=1", f"https://host/x?access_token={MASK}&n=1"),
        (f"http://bob:a/b?{PASSWORD}#c@host:9/x", f"http://{MASK}@host:9/x"),
        (f"https://host/x?sv=1&sig={PASSWORD}", f"https://host/x?sv=1&sig={MASK}"),
        ("http://host:9/a@b http://[::1]:9/a@b", "http://host:9/a@b http://[::1]:9/a@b"),
        (f"Bearer {TOKEN}.", f"Bearer {MASK}."),
        ("mail bob@host, http://host/a@b, harmless", "mail bob@host, http://host/a@b, harmless"),
    ],
)
def test_logins_of_addresses_and_values_of_secret_variables_are_masked(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert str(UserError(text)) == first_line(Exception(text)) == shown


def test_a_password_of_an_address_in_the_environment_is_masked_where_it_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://bob:{PASSWORD}%21@host/db")
    assert redacted(f"password {PASSWORD}! is wrong") == f"password {MASK} is wrong"


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "MYSQL_PWD",
        "DB_PASS",
        "OPENAI_APIKEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "SSH_PASSPHRASE",
        "AWS_SECRET_ACCESS_KEY",
        "LOLCATS_WEBHOOK_URL",
        "REGISTRY_CREDENTIALS",
    ],
)
def test_a_variable_is_secret_by_how_its_words_end(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, PASSWORD)
    monkeypatch.setenv("OLDPWD", "/a/directory")
    assert redacted(f"{PASSWORD} in /a/directory") == f"{MASK} in /a/directory"


def test_a_secret_is_masked_however_a_text_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'pä"ss/w<rd>'
    monkeypatch.setenv("LOLCATS_AUTH", f"bob:{secret}")
    header = base64.b64encode(f"bob:{secret}".encode()).decode()
    address = urllib.parse.quote(secret, safe="")
    for text in (json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret), header, address):
        assert redacted(f"Basic {text} is wrong") == f"Basic {MASK} is wrong", text


def test_no_thread_tells_a_secret_when_it_dies(capsys: pytest.CaptureFixture[str]) -> None:
    keep_secrets()

    def die() -> None:
        raise RuntimeError(TOKEN)

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    shown = capsys.readouterr().err
    assert f"RuntimeError: {MASK}" in shown
    assert TOKEN not in shown


def test_a_stage_that_cannot_reach_its_server_tells_no_password(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{PASSWORD}@127.0.0.1:9")
    monkeypatch.delenv(mlflow_run.RETRIES, raising=False)
    assert execute("teacher", fake_project, lambda stage: {}) == 1
    shown = "".join(capfd.readouterr())
    assert "127.0.0.1:9 does not answer" in shown
    files = [file for file in (fake_project / ".scratch").rglob("*") if file.is_file()]
    assert fake_project / ".scratch" / "teacher" / "error.txt" in files
    assert PASSWORD not in shown + "".join(file.read_text() for file in files)


def test_mlflow_gets_the_login_and_its_address_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://bob:{PASSWORD}%21@host:9/base")
    assert tracking_uri(tmp_path) == os.environ["MLFLOW_TRACKING_URI"] == "https://host:9/base"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "bob"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == f"{PASSWORD}!"


def test_no_log_and_no_traceback_tells_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    keep_secrets()
    logger = logging.getLogger("tests.secrets")
    handler = logging.StreamHandler(sys.stderr)  # as any library, Prefect among them, makes one
    logger.addHandler(handler)
    # What other tests of this process made of the loggers above it does not matter here.
    logger.propagate, logger.disabled = False, False
    logger.setLevel(logging.ERROR)
    try:
        try:
            raise RuntimeError(f"http://bob:{PASSWORD}@host")
        except RuntimeError as error:
            logger.exception("with %s", TOKEN)
            sys.excepthook(RuntimeError, error, error.__traceback__)
    finally:
        logger.removeHandler(handler)
    shown = capsys.readouterr().err
    assert shown.count(f"RuntimeError: http://{MASK}@host") == 2
    assert PASSWORD not in shown
    assert TOKEN not in shown


def test_mlflow_s_store_holds_no_secret(fake_project: Path) -> None:
    secret = f"http://bob:{PASSWORD}@host {TOKEN}"
    params = Params(data=DataParams(source=secret))
    run = Run.start(fake_project, "teacher", params=params, tags={"first": secret})
    run.set_tags({"second": secret})
    run.log_dataset("text", secret, "0", "training")
    run.log_text(secret, "page.txt")
    run.finish("FAILED", secret)
    with sqlite3.connect(fake_project / "mlflow.db") as store:
        told = "\n".join(store.iterdump())
    told += "".join(file.read_text() for file in (fake_project / "mlartifacts").rglob("*") if file.is_file())
    assert told.count(MASK) >= 5
    assert PASSWORD not in told
    assert TOKEN not in told

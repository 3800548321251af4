"""Whatever registration and gates write into MLflow's store holds no secret."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path

import pytest

from lolcats_common.params import DataParams, GatesParams, TeacherParams, load_params
from lolcats_common.secrets import MASK
from tasks.registry import promotion, register
from tasks.registry.promotion import run_gates, set_tag
from tasks.runner.mlflow_client import TAG
from tasks.runner.mlflow_run import connect

NAME, PASSWORD, TOKEN = "lolcats-demo", "SUPERSECRETPW", "hf_averysecrettoken"


def test_tags_reports_and_reasons_hold_no_secret(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
    secret = f"https://bob:{PASSWORD}@host/{TOKEN}"
    params = load_params(finished / "params.yaml")
    asked = dataclasses.replace(params, data=DataParams(source=secret), teacher=TeacherParams(source=secret))
    version = register.register(finished, asked).version
    monkeypatch.setattr(promotion, "_probe", lambda stored: {"error": f"no answer of {secret}"})
    report, _ = run_gates(finished, NAME, GatesParams(), version)
    assert not report.passed
    set_tag(finished, NAME, version, "lock.branch", secret)
    tags = connect(finished).get_model_version(NAME, version).tags
    assert tags["data.source"] == tags["teacher.source"] == tags["lock.branch"] == f"https://{MASK}@host/{MASK}"
    assert tags["gates.reasons"].count(MASK) >= 2
    set_tag(finished, NAME, version, "long", "x" * (TAG - 3) + TOKEN)
    with sqlite3.connect(finished / "mlflow.db") as store:
        told = "\n".join(store.iterdump())
    told += "".join(file.read_text(errors="replace") for file in (finished / "mlartifacts").rglob("*.[jm][sd]*"))
    assert PASSWORD not in told
    assert TOKEN[:6] not in told

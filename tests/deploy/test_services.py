"""A run through the composition's services: Postgres holds what Prefect and MLflow know, the S3 store the bytes."""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lolcats_common.files import sha256_tree
from tasks.versioning import dvc_graph
from tests.conftest import run_git
from tests.deploy.composed import SECRETS, Composition, composition, connection
from tests.flows.operations import Servers, deployable, operate
from tests.tasks.processes import processes_in, wait_for

NAME = "lolcats-demo"


def rows(composed: Composition, database: str, query: str) -> list[Any]:
    with connection(composed, database) as link, link.cursor() as cursor:
        cursor.execute(query)
        return list(cursor.fetchall())


def objects(composed: Composition, bucket: str) -> list[str]:
    import boto3

    keys = {"aws_access_key_id": SECRETS["S3_ACCESS_KEY"], "aws_secret_access_key": SECRETS["S3_SECRET_KEY"]}
    store = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{composed.ports['store']}", **keys)
    return [entry["Key"] for entry in store.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.mark.slow
def test_a_run_keeps_its_records_in_postgres_and_its_bytes_in_the_s3_store(
    fake_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operate(fake_project)
    deployable(fake_project)
    with composition(fake_project) as composed:
        # DVC keeps its bytes in the same store, in MLflow's bucket.
        dvc_graph.run_dvc(fake_project, "remote", "add", "--local", "--default", "store", "s3://mlflow/dvc")
        address = f"http://127.0.0.1:{composed.ports['store']}"
        dvc_graph.run_dvc(fake_project, "remote", "modify", "--local", "store", "endpointurl", address)
        servers = Servers(fake_project, composed.environment("worker"))
        servers.gone = composed.gone  # type: ignore[method-assign]
        servers.variables = {name: servers.environment[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}

        def deployed() -> bool:
            try:
                return bool(servers.deployment("rollback/previous"))
            except urllib.error.HTTPError:
                return False

        servers.wait(deployed, "the deployments")
        state = servers.ended(servers.run("linearize/by-hand"))
        assert state["name"] == "Completed", state["message"] + composed.log()

        (version,) = rows(composed, "mlflow", "SELECT version, source FROM model_versions")
        assert version[0] == 1
        assert ("linearize",) in rows(composed, "prefect", "SELECT name FROM flow")
        stored = objects(composed, "mlflow")
        assert [key for key in stored if key.endswith("artifacts/model/weights.txt")]
        assert [key for key in stored if key.startswith("dvc/files/md5/")]

        # The bytes come back as they were made; without the store's key they do not.
        environment = composed.environment("mlflow")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
            monkeypatch.setenv(name, environment[name])
        uri = f"http://127.0.0.1:{composed.ports['mlflow']}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        from tasks.registry.versions import stored_model

        with stored_model(client, client.get_model_version(NAME, "1")) as model:
            assert sha256_tree(model / "artifacts" / "model") == sha256_tree(fake_project / "outputs/finetune/model")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/mlflow?list-type=2")
        # Prefect asks for its login.
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{servers.variables['PREFECT_API_URL']}/admin/version")
        login = base64.b64encode(SECRETS["LOLCATS_LOGIN"].encode()).decode()
        request = urllib.request.Request(
            f"{servers.variables['PREFECT_API_URL']}/admin/version", headers={"Authorization": f"Basic {login}"}
        )
        assert urllib.request.urlopen(request).status == 200
    assert run_git(fake_project, "status", "--porcelain", "--untracked-files=no") == ""
    wait_for(lambda: not list(processes_in(fake_project)), "the end of every process")

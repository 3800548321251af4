"""Registration: once per model, never half, and a version that loads and generates without this project."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lolcats_common.errors import UserError
from lolcats_common.params import load_params
from tasks.registry import register as registry
from tasks.registry.versions import download
from tasks.runner.mlflow_run import connect
from tasks.runner.processes import end_group
from tasks.versioning import dvc_graph
from tests.tasks.conftest import set_model
from tests.tasks.processes import wait_for

LOAD = """
import importlib.util, json, sys
sys.path = [p for p in sys.path if p != sys.argv[1]]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("lolcats_core") is None
import mlflow
import pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[2])
params = {"max_new_tokens": 3}
texts = model.predict(["x = ", "y"], params=params)
assert texts == model.predict(pd.DataFrame({"prompt": ["x = ", "y"]}), params=params)
# Prompts of different lengths in one batch, and more of them than one batch holds.
assert texts == [model.predict([prompt], params=params)[0] for prompt in ("x = ", "y")]
assert model.predict(["x = ", "y"] * 20, params=params) == texts * 20
print(json.dumps(texts))
"""


def register(root: Path) -> registry.RegisteredVersion:
    return registry.register(root, load_params(root / "params.yaml"))


def versions(root: Path) -> list[Any]:
    return list(connect(root).search_model_versions("name = 'lolcats-demo'"))


def test_one_version_per_model_and_an_alias_that_someone_moved_stays(finished: Path) -> None:
    first, again = register(finished), register(finished)
    assert (first.version, first.created) == ("1", True)
    assert (again.version, again.created) == ("1", False)
    set_model(finished, "m2")
    assert register(finished).version == "2"
    client = connect(finished)
    assert client.get_model_version_by_alias("lolcats-demo", "candidate").version in (2, "2")
    client.set_registered_model_alias("lolcats-demo", "candidate", "1")
    assert register(finished).created is False
    assert client.get_model_version_by_alias("lolcats-demo", "candidate").version in (1, "1")


def test_a_version_says_where_it_comes_from(finished: Path) -> None:
    register(finished)
    (version,) = versions(finished)
    commit = subprocess.run(["git", "-C", finished, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    expected = {
        "git.commit": commit,
        "git.dirty": "false",
        "model.md5": "m1",
        "dvc.md5.finetune": "out",
        "run.finetune": "r-finetune",
        "teacher.source": "builtin",
        "lm_eval.version": "0.4",
        "perplexity.finetuned": "12.0000",
        "code_continuation.finetuned": "0.5000 ± 0.1000",
        "gpu": version.tags["gpu"],
    }
    assert expected.items() <= version.tags.items()
    assert {"version.torch", "version.transformers"} <= set(version.tags)
    assert version.description.startswith("Student of `builtin`")
    assert version.description.endswith("Perplexity 12, 1.2 times the teacher's 10.")


@pytest.mark.parametrize("step", ["create_model_version", "set_registered_model_alias", "set_model_version_tag"])
def test_an_interrupted_registration_is_completed_by_the_next(
    finished: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from mlflow import MlflowClient

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            register(finished)
    assert register(finished).version == "1"
    (version,) = versions(finished)
    assert version.tags[registry.COMPLETE] == "complete"
    assert connect(finished).get_model_version_by_alias("lolcats-demo", "candidate").version in (1, "1")


def test_a_store_that_fails_while_the_model_is_logged_leaves_no_version(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    with pytest.raises(UserError, match="disk full"):
        register(finished)
    assert versions(finished) == []


def test_stale_or_missing_outputs_are_not_registered(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_graph, "changed", lambda root, anew=False: {"evaluate": ["changed deps"]})
    with pytest.raises(UserError, match="evaluate: outputs are not those"):
        register(finished)
    (finished / "outputs" / "finetune" / "model").unlink()
    with pytest.raises(UserError, match="outputs/finetune/model is missing"):
        register(finished)
    assert versions(finished) == []


@pytest.mark.slow
def test_the_registered_model_loads_and_generates_without_this_project(finished: Path, tmp_path: Path) -> None:
    done = register(finished)
    texts = load_elsewhere(connect(finished).tracking_uri, done.uri, tmp_path)
    assert len(texts) == 2
    path = download(finished, "lolcats-demo", "candidate")
    assert (path / "model.safetensors").is_file()
    assert download(finished, "lolcats-demo", "lolcats-demo/1") == path
    with pytest.raises(UserError, match="no such directory or registered version"):
        download(finished, "lolcats-demo", "champion")


def load_elsewhere(store: str, uri: str, directory: Path) -> list[str]:
    """Predictions of the model in a process that cannot import this project."""
    checkout = str(Path(registry.__file__).parents[2])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, checkout, uri], capture_output=True, text=True, cwd=directory, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An MLflow server that keeps artifacts itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{tmp_path}/server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=60).status == 200
        except OSError:
            return False

    try:
        wait_for(healthy, "the MLflow server", lambda: log.read_text() if process.poll() is not None else "")
        yield url
    finally:
        end_group(process, 5)


@pytest.mark.slow
def test_registration_works_with_a_server(
    finished: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    (finished / "mlflow.db").unlink()
    assert register(finished).created
    assert not register(finished).created
    assert not (finished / "mlflow.db").exists()
    assert len(load_elsewhere(server, "models:/lolcats-demo@candidate", tmp_path)) == 2


def test_prompts_of_like_length_are_completed_together() -> None:
    from tasks.registry.serving_model import ROWS, TOKENS, batches

    assert batches([]) == []
    assert batches([5, 20_000, 3, 50]) == [[2, 0, 3], [1]]  # the long one would be the length of all
    assert batches([TOKENS * 2]) == [[0]]
    for lengths in ([7] * 100, [TOKENS // 4] * 9, list(range(1, 3000, 37))):
        found = batches(lengths)
        assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) <= ROWS
            assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= TOKENS


def test_a_student_that_is_not_finite_is_not_registered(finished: Path, tmp_path: Path) -> None:
    model = finished / "outputs" / "finetune" / "model"
    copy = shutil.copytree(model.resolve(), tmp_path / "model")
    model.unlink()
    model.symlink_to(copy)
    tensors = load_file(copy / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"the tensor {name} holds NaN or infinite values"):
        register(finished)
    assert versions(finished) == []

"""Nothing of a stored version is used before every file of it was held against what was registered."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.params import load_params
from tasks.cli.export import export
from tasks.cli.model import _model_path
from tasks.operations import drift
from tasks.registry import manifest
from tasks.registry.lineage import lineage
from tasks.registry.promotion import promote, rollback, run_gates
from tasks.registry.versions import stored_model, version_files
from tasks.runner.mlflow_run import connect
from tasks.studies import compare
from tests.tasks.registry.test_promotion import NAME, UNPROBED, add, serve, stored


def measure_drift(root: Path) -> Any:
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("drift_source: null", "drift_source: ./text.txt"))
    return drift.measure(root, load_params(params))


def kept_manifest(root: Path) -> Path:
    (kept,) = (root / "mlartifacts").rglob("manifests/*.json")
    return kept


# Every way in which a stored version is used; version 1 is the champion until 2 is promoted to roll back from.
DOORS: dict[str, Callable[[Path], Any]] = {
    "gates": lambda root: run_gates(root, NAME, UNPROBED, "1"),
    "promote": lambda root: promote(root, NAME, "1"),
    "gates of the next version": lambda root: run_gates(root, NAME, UNPROBED, "2"),
    "drift": measure_drift,
    "rollback": lambda root: promote(root, NAME, "2") and rollback(root, NAME),
    "export": lambda root: export(root, "1"),
    "compare": lambda root: compare.load(root, NAME, "1"),
    "lineage": lambda root: lineage(root, NAME, "1"),
    "generate": lambda root: _model_path("1"),
}


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\nraise SystemExit('executed')\n")


def link(path: Path) -> None:
    copy = path.parents[3] / "elsewhere"
    shutil.move(path, copy)
    path.symlink_to(copy)


TAMPERED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "code": ("serving_model.py", append, "is not the file that was registered"),
    "code folder": ("code/lolcats_core/__init__.py", append, "is not the file that was registered"),
    "more code": ("code/torch.py", lambda path: path.write_text("1"), "is not among the files that were registered"),
    "compiled": ("code/x.pyc", lambda path: path.write_bytes(b"1"), "is not among the files that were registered"),
    "MLmodel": ("MLmodel", append, "is not the file that was registered"),
    "evaluation": ("artifacts/evaluation.json", append, "is not the file that was registered"),
    "weights": ("artifacts/model/model.safetensors", append, "is not the file that was registered"),
    "configuration": ("artifacts/model/config.json", append, "is not the file that was registered"),
    "missing": ("artifacts/params.yaml", Path.unlink, "is missing"),
    "link": ("artifacts/params.yaml", link, "is a link or no plain file"),
}


def test_a_file_that_differs_is_named_in_one_line(finished: Path, tmp_path: Path) -> None:
    add(finished, "m1")
    path = stored(finished, "1")
    assert version_files(finished, NAME, "1")[1] == path / "artifacts"
    shutil.copytree(path, tmp_path / "whole")
    for name, tamper, problem in TAMPERED.values():
        tamper(path / name)
        with pytest.raises(UserError, match=f"^{NAME} version 1 is not used: {name} {problem}"):
            pytest.fail(f"{name} gave {version_files(finished, NAME, '1')}")
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "whole", path)
    version_files(finished, NAME, "1")


def test_every_door_refuses_a_version_whose_code_was_changed_after_its_gates(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    serve(finished, "m1")
    serve(finished, "m2")
    rollback(finished, NAME)
    append(stored(finished, "1") / "serving_model.py")
    for door, use in DOORS.items():
        with pytest.raises(UserError, match=r"version 1 is not used: serving_model\.py is not the file"):
            pytest.fail(f"{door} gave {use(finished)}")


def test_what_loading_leaves_in_a_store_is_removed_and_never_runs(finished: Path) -> None:
    serve(finished, "m1")
    path = stored(finished, "1")
    cached = path / "code" / "lolcats_core" / "__pycache__" / "errors.cpython-311.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"planted")
    (path / manifest.META).write_text(f"model_name: {NAME}")
    run_gates(finished, NAME, UNPROBED, "1")
    assert not cached.parent.exists()


@pytest.mark.parametrize("damage", [Path.unlink, append])
def test_a_version_is_checked_without_the_manifest_that_names_its_files(
    finished: Path, damage: Callable[[Path], None]
) -> None:
    serve(finished, "m1")
    kept = kept_manifest(finished)
    assert "serving_model.py" in json.loads(kept.read_text())
    damage(kept)
    version_files(finished, NAME, "1")
    append(stored(finished, "1") / "serving_model.py")
    with pytest.raises(UserError, match="the manifest that would say which is gone"):
        version_files(finished, NAME, "1")


def test_a_version_that_was_registered_before_manifests_loads_with_one_warning(
    finished: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_warned", set())
    serve(finished, "m1")
    path = stored(finished, "1")
    connect(finished).delete_model_version_tag(NAME, "1", manifest.TAG)
    kept_manifest(finished).unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert version_files(finished, NAME, "1")[1] == path / "artifacts"
            promote(finished, NAME, "1")
    assert [r.message for r in caplog.records if "manifest" in r.message] == [
        f"{NAME} version 1 was registered without a manifest: only its model's files were compared"
    ]
    append(path / "artifacts" / "model" / "model.safetensors")
    with pytest.raises(UserError, match="the files of its model are not those that were registered"):
        version_files(finished, NAME, "1")


def test_a_store_on_another_machine_is_checked_in_a_copy(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.artifacts

    serve(finished, "m1")
    here, client = stored(finished, "1"), connect(finished)

    def far(client: Any, model: str) -> Any:
        return type("Model", (), {"artifact_location": "mlflow-artifacts:/1"})

    def fetch(artifact_uri: str, dst_path: str) -> str:
        return str(shutil.copytree(here, Path(dst_path) / "copy"))

    monkeypatch.setattr(type(client), "get_logged_model", far)
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fetch)
    with stored_model(client, client.get_model_version(NAME, "1")) as copy:
        assert copy != here
    assert not copy.exists()
    append(here / "serving_model.py")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"serving_model\.py is not the file"):
        version_files(finished, NAME, "1")


@pytest.mark.parametrize("question", ["list_artifacts", "get_run"])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_store_that_does_not_answer_does_not_say_that_there_is_no_manifest(
    finished: Path, monkeypatch: pytest.MonkeyPatch, question: str, tagged: bool
) -> None:
    serve(finished, "m1")
    client = connect(finished)
    if tagged:
        append(stored(finished, "1") / "serving_model.py")
    else:
        client.delete_model_version_tag(NAME, "1", manifest.TAG)
    with monkeypatch.context() as patch:

        def fail(*arguments: Any, **options: Any) -> None:
            raise MlflowException("HTTP 503: try again later")

        patch.setattr(type(client), question, fail)
        with pytest.raises(Unavailable, match=r"version 1 is not used: the store does not say what was reg.*503"):
            version_files(finished, NAME, "1")
    # Once it answers, the version is refused for good.
    with pytest.raises(UserError, match=r"version 1 is not used: (serving_model|its tag manifest\.sha256)"):
        version_files(finished, NAME, "1")


def test_a_version_whose_tag_was_taken_away_is_no_version_from_before_manifests(finished: Path) -> None:
    serve(finished, "m1")
    append(stored(finished, "1") / "serving_model.py")
    connect(finished).delete_model_version_tag(NAME, "1", manifest.TAG)
    for use in (lambda: run_gates(finished, NAME, UNPROBED, "1"), lambda: promote(finished, NAME, "1")):
        with pytest.raises(UserError, match=r"its tag manifest\.sha256, which its manifest belongs to, is gone"):
            use()

"""Aliases and gates on a real registry: nothing serves that did not pass, or whose bytes are not those registered."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.params import GatesParams, load_params
from tasks.registry import gate_probe, lineage, register, versions
from tasks.registry.promotion import CHALLENGER, CHAMPION, PREVIOUS, promote, rollback, run_gates
from tasks.registry.versions import alias_version
from tasks.runner.mlflow_run import connect
from tests.conftest import run_git
from tests.tasks.conftest import set_model

NAME = "lolcats-demo"
UNPROBED = GatesParams(**dict.fromkeys(("loads", "recurrent", "left_padding", "speed", "memory"), "disabled"))


def add(root: Path, md5: str, student: float = 12.0) -> str:
    """Register one more version, whose student has this perplexity; its number."""
    file = root / "outputs" / "evaluate" / "evaluation.json"
    values = json.loads(file.read_text())
    values["perplexity"]["finetuned"] = student
    file.write_text(json.dumps(values))
    set_model(root, md5)
    return register.register(root, load_params(root / "params.yaml")).version


def aliases(root: Path) -> dict[str, str]:
    client = connect(root)
    found = {alias: alias_version(client, NAME, alias) for alias in (CHALLENGER, CHAMPION, PREVIOUS)}
    return {alias: str(version.version) for alias, version in found.items() if version is not None}


def stored(root: Path, number: str) -> Path:
    client = connect(root)
    with versions.stored_model(client, client.get_model_version(NAME, number)) as path:
        return path


def serve(root: Path, md5: str, student: float = 12.0) -> str:
    number = add(root, md5, student)
    _, status = run_gates(root, NAME, UNPROBED, number)
    assert status.passed
    assert status == versions.version_status(root, NAME, number)
    return promote(root, NAME, number).version


@pytest.mark.slow
def test_the_gates_load_the_stored_model_and_see_what_is_wrong_with_it(finished: Path) -> None:
    number = add(finished, "m1")
    report, _ = run_gates(finished, NAME, GatesParams(max_logit_difference=1e-4), "candidate")
    assert report.passed, report.reasons
    assert aliases(finished) == {CHALLENGER: number}
    client = connect(finished)
    run = client.get_model_version(NAME, number).run_id
    assert {item.path for item in client.list_artifacts(run, "gates")} == {
        f"gates/version-{number}.{suffix}" for suffix in ("md", "json")
    }
    weights = stored(finished, number) / "artifacts" / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"model.safetensors is not the file that was registered"):
        run_gates(finished, NAME, GatesParams(), number)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def archive(kind: str) -> bytes:
    """A pickle in an archive; a zip file is one whatever stands before it."""
    held, content = io.BytesIO(), pickle.dumps(Bomb(), 0)
    if kind == "zip":
        held.write(b"# a heading\n")
        with zipfile.ZipFile(held, "a") as zipped:
            zipped.writestr("data.pkl", content)
    elif kind == "npz":
        np.savez(held, a=np.array([Bomb()], dtype=object))
    else:
        with tarfile.open(fileobj=held, mode=f"w:{kind}") as tarred:
            entry = tarfile.TarInfo("data.pkl")
            entry.size = len(content)
            tarred.addfile(entry, io.BytesIO(content))
    return held.getvalue()


# Contents that run something or hide what they are, each under every name that is known.
HIDDEN = {
    **{f"protocol {number}": pickle.dumps(Bomb(), number) for number in range(6)},
    "pickle before text": pickle.dumps(Bomb(), 0) + b"\n# a heading\n",
    "calls without a class": b"(S'executed'\nibuiltins\nprint\n.",
    **{kind: archive(kind) for kind in ("zip", "npz", "", "gz", "bz2", "xz")},
    "zeros": bytes(64),
}


def test_a_pickle_in_a_registered_model_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    whole = {
        "MLmodel": b"flavors: {}",
        "config.json": b'{"a": [1]}',
        "samples.jsonl": b'{"a": 1}\n[2]\n',
        "tokenizer.model": b"\n\x0e\n\x05<unk>",
        "code.py": b"class A:\n    x = 1\n",
        "README.md": "common words, é\nI.\n".encode(),
        "empty.txt": b"",
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    gate_probe.check_files(tmp_path)
    for name in ("pytorch_model.bin", "weights.npy", "state.dill", "sub/a.pt", "a.pth", "a.JSON", "lib.so", "a.pyc"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is of no known kind"):
            gate_probe.check_files(tmp_path)
        (tmp_path / name).unlink()
    for name in ("sub/x", "sub/x.json", "sub/x.jsonl", "sub/x.md", "sub/x.py", "sub/x.txt", "sub/x.model"):
        for content in HIDDEN.values():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name} holds (a pickle|an archive|no \w+), only safetensors"):
                pytest.fail(f"{name}: {content[:40]!r} gave {gate_probe.check_files(tmp_path)}")
        (tmp_path / name).unlink()
    for content in HIDDEN.values():
        (tmp_path / "more.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"more\.safetensors holds no safetensors"):
            gate_probe.check_files(tmp_path)
    (tmp_path / "more.safetensors").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors file"):
        gate_probe.check_files(tmp_path)


def test_a_worse_version_is_refused_and_a_better_one_takes_over_and_back(finished: Path) -> None:
    assert serve(finished, "m1") == "1"
    assert aliases(finished) == {CHAMPION: "1"}
    worse = add(finished, "m2", 12.5)
    report, _ = run_gates(finished, NAME, UNPROBED, worse)
    assert report.reasons == ["regression: student's perplexity over the teacher's is 1.25, the bound is at most 1.224"]
    with pytest.raises(UserError, match="version 2 did not pass its gates: regression"):
        promote(finished, NAME, worse)
    assert aliases(finished) == {CHAMPION: "1"}
    assert serve(finished, "m3", 11.0) == "3"
    assert aliases(finished) == {CHAMPION: "3", PREVIOUS: "1"}
    assert promote(finished, NAME, "3") == versions.version_status(finished, NAME, "3")
    assert aliases(finished) == {CHAMPION: "3", PREVIOUS: "1"}
    assert rollback(finished, NAME) == ("1", "3")
    assert aliases(finished) == {CHAMPION: "1", PREVIOUS: "3"}
    assert rollback(finished, NAME) == ("3", "1")


@pytest.mark.parametrize("going", ["{", "[1]", '"champion"', '{"champion": "2"}'])
def test_a_move_that_says_nothing_moves_nothing(finished: Path, going: str) -> None:
    serve(finished, "m1")
    connect(finished).set_registered_model_tag(NAME, "move", going)
    with pytest.raises(UserError, match=r"its tag `move` must say where champion and previous go, got") as caught:
        promote(finished, NAME, "1")
    assert len(str(caught.value).splitlines()) == 1
    assert aliases(finished) == {CHAMPION: "1"}


def test_what_cannot_serve_is_refused_in_one_line(finished: Path) -> None:
    with pytest.raises(UserError, match="no version or alias 'challenger'"):
        promote(finished, NAME)
    first = add(finished, "m1")
    with pytest.raises(UserError, match="was not examined; run `lolcats gates 1` first"):
        promote(finished, NAME, first)
    serve(finished, "m2")
    with pytest.raises(UserError, match="no previous champion"):
        rollback(finished, NAME)
    serve(finished, "m3")
    shutil.rmtree(stored(finished, "2"))
    with pytest.raises(UserError, match="version 2 are missing from the store"):
        rollback(finished, NAME)
    assert aliases(finished) == {CHAMPION: "3", PREVIOUS: "2"}
    client = connect(finished)
    client.delete_model_version_tag(NAME, first, versions.COMPLETE)
    with pytest.raises(UserError, match="registration was cut short"):
        run_gates(finished, NAME, UNPROBED, first)


def test_every_command_takes_a_version_by_number_alias_or_with_its_name(finished: Path) -> None:
    number = add(finished, "m1")
    client = connect(finished)
    for which in (number, "candidate", f"{NAME}/{number}", f"{NAME}@candidate"):
        assert versions.find_version(client, NAME, which).version == int(number)
        assert versions.version_files(finished, NAME, which)[0].version == int(number)
    with pytest.raises(UserError, match=f"other/1 is a version of other; this project's are of {NAME}"):
        promote(finished, NAME, "other/1")


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_rollback_that_was_cut_short_is_completed_by_whoever_comes_next(
    finished: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    from mlflow import MlflowClient

    serve(finished, "m1")
    serve(finished, "m2")
    real, done = MlflowClient.set_registered_model_alias, []

    def interrupted(*arguments: Any, **options: Any) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(arguments)
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", interrupted)
        patch.setattr(MlflowClient, "delete_registered_model_tag", lambda *a: interrupted() if calls == 2 else None)
        with pytest.raises(KeyboardInterrupt):
            rollback(finished, NAME)
    # What comes next is a rollback: the first one counts as done, so this one goes forward again.
    assert rollback(finished, NAME) == ("2", "1")
    assert aliases(finished) == {CHAMPION: "2", PREVIOUS: "1"}


def test_who_is_overtaken_by_another_machine_does_not_say_that_its_version_serves(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for md5 in ("m1", "m2", "m3"):
        run_gates(finished, NAME, UNPROBED, add(finished, md5))
    real = MlflowClient.set_registered_model_tag

    def overtaken(client: MlflowClient, name: str, key: str, value: str) -> None:
        real(client, name, key, value)
        real(client, name, key, json.dumps({CHAMPION: "3", PREVIOUS: None}))  # the other machine's

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_tag", overtaken)
        with pytest.raises(UserError, match=r"version 2 is not the champion: another machine .* to version 3"):
            promote(finished, NAME, "2")
    assert aliases(finished)[CHAMPION] == "3"
    promote(finished, NAME, "2")
    assert aliases(finished)[CHAMPION] == "2"
    assert aliases(finished)[PREVIOUS] == "3"


def test_two_writers_of_one_model_make_one_version(finished: Path) -> None:
    set_model(finished, "m1")
    params = load_params(finished / "params.yaml")
    connect(finished)
    found: list[str] = []
    both = threading.Barrier(2)

    def write() -> None:
        both.wait()
        for _ in range(5):  # as the flow's task does
            with contextlib.suppress(Unavailable):
                found.append(register.register(finished, params).version)
                return

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(set(found)) == 1
    assert len(found) == 2
    (version,) = connect(finished).search_model_versions(f"name = '{NAME}'")
    assert version.tags[versions.COMPLETE] == "complete"


def test_a_store_that_does_not_answer_is_said_to_be_so(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse(*arguments: Any, **options: Any) -> None:
        raise MlflowException("connection refused")

    serve(finished, "m1")
    monkeypatch.setattr(MlflowClient, "get_model_version_by_alias", refuse)
    with pytest.raises(Unavailable, match="connection refused"):
        promote(finished, NAME)


def test_lineage_leads_to_the_commit_that_holds_dvc_lock(finished: Path) -> None:
    serve(finished, "m1")
    version = connect(finished).get_model_version(NAME, "1")
    commit = version.tags["lock.commit"]
    assert run_git(finished, "show", f"{commit}:dvc.lock") == (finished / "dvc.lock").read_text()
    assert run_git(finished, "rev-parse", f"{commit}^").strip() == version.tags["git.commit"]
    assert run_git(finished, "status", "--porcelain") == "?? dvc.lock\n"
    short, page = (lineage.lineage(finished, NAME, CHAMPION, everything) for everything in (False, True))
    assert commit in short
    assert "dvc.md5.finetune" not in short
    for expected in (commit, "run.finetune", "r-finetune", "dvc.md5.finetune", "params.yaml", "gates: passed"):
        assert expected in page
    assert versions.version_status(finished, NAME, "1").aliases == ("candidate", CHAMPION)


@pytest.mark.parametrize("call", ["get_model_version_by_alias", "get_model_version", "get_logged_model"])
def test_a_store_that_stops_answering_is_no_missing_version_so_that_the_flow_tries_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    serve(finished, "m1")
    serve(finished, "m2")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise MlflowException("API request failed with exception: connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, refuse)
        with pytest.raises(Unavailable, match="connection refused"):
            promote(finished, NAME, "1") if call == "get_model_version" else rollback(finished, NAME)
    assert aliases(finished) == {CHAMPION: "2", PREVIOUS: "1"}
    assert rollback(finished, NAME) == ("1", "2")


def test_a_store_that_stops_answering_while_changes_are_looked_for_is_asked_again(finished: Path) -> None:
    class Client:
        def search_model_versions(self, *arguments: Any, **options: Any) -> None:
            raise MlflowException("connection refused")

    with pytest.raises(Unavailable, match="connection refused"):
        versions.find_model(Client(), NAME, "m1")

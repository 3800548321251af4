"""A file behind `data.source` or `teacher.source` that changed is seen, although params.yaml did not change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory
from lolcats_common.params import apply_overrides, load_params
from tasks import inputs
from tasks.runner.stage import Stage, Untracked
from tasks.versioning import dvc_graph
from tests.conftest import fake_dvc, shell_stage

ROOT = Path(__file__).parents[2]
OLD = 1_700_000_000


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """params.yaml with a teacher directory and a data file."""
    for name in ("teacher", "data.jsonl"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / "teacher").mkdir()
    write(tmp_path / "teacher" / "config.json", "{}")
    write(tmp_path / "data.jsonl", '{"text": "a"}\n')
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    chosen = apply_overrides(params, {"teacher.source": "./teacher", "data.source": "data.jsonl"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(chosen))
    return tmp_path


def write(path: Path, text: str) -> None:
    """A file whose time lies back, as that of a file which nobody touches."""
    path.write_text(text)
    os.utime(path, (OLD, OLD))


def run(root: Path) -> None:
    """The stage without DVC and the rest of its harness."""
    params, scratch = load_params(root / "params.yaml"), root / ".scratch" / "inputs"
    with atomic_directory(root / "outputs" / "inputs") as out:
        inputs.run(Stage("inputs", root, params, out, scratch, Untracked()))


def found(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    run(root)
    files = [json.loads((root / "outputs" / "inputs" / f"{name}.json").read_text()) for name in ("teacher", "data")]
    return files[0]["files"], files[1]["files"]


def test_content_decides_and_not_the_time(project: Path) -> None:
    before = found(project)
    assert found(project) == before
    os.utime(project / "data.jsonl", (OLD + 5, OLD + 5))
    assert found(project) == before
    write(project / "data.jsonl", '{"text": "b"}\n')  # the same size and time
    assert found(project)[1] != before[1]
    assert found(project)[0] == before[0]
    write(project / "teacher" / "config.json", "[]")
    assert found(project)[0] != before[0]


def test_files_that_did_not_change_are_not_read_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found(project)
    monkeypatch.setattr(inputs, "sha256_file", lambda file: pytest.fail(f"{file} was read again"))
    assert found(project) == before


def test_a_damaged_memory_of_hashes_counts_as_none(project: Path) -> None:
    before = found(project)
    (project / inputs.MEMORY).write_text("[1")
    assert found(project) == before


def test_a_source_that_is_gone_is_one_line(project: Path) -> None:
    (project / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.jsonl does not exist"):
        run(project)
    assert not (project / "outputs" / "inputs").exists()


def test_dvc_runs_what_reads_a_changed_file_and_calls_nothing_stale_otherwise(fake_project: Path) -> None:
    inputs = shell_stage("outputs/inputs/data.json", "source.txt") | {"deps": [], "meta": {"outside": True}}
    prepare = shell_stage("outputs/prepare/rows", "outputs/inputs/data.json") | {"params": []}
    (fake_project / "dvc.yaml").write_text(
        fake_dvc("inputs", "prepare", inputs=inputs, prepare=prepare | {"params": []})
    )

    def states(content: str) -> list[str]:
        (fake_project / "source.txt").write_text(content)
        return [dvc_graph.repro(name, fake_project, on_line=lambda line: None).state for name in ("inputs", "prepare")]

    assert states("a") == ["ran", "ran"]
    assert states("a") == ["ran", "unchanged"]
    assert dvc_graph.changed(fake_project) == {}
    assert states("b") == ["ran", "ran"]

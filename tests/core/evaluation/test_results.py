"""Kept results belong to one model, one code and one set of settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_core.evaluation import results
from lolcats_core.evaluation.results import ResultCache, model_hash
from tests.core.tiny import tiny_student, tiny_teacher


def test_a_models_hash_follows_its_weights_settings_and_dtype_but_not_where_it_came_from(tmp_path: Path) -> None:
    student = tiny_student()
    first = model_hash(student)
    student.save_pretrained(tmp_path)
    assert model_hash(type(student).from_pretrained(tmp_path)) == first
    others = [model_hash(tiny_teacher()), model_hash(student.to(torch.bfloat16))]
    changed = tiny_student()
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    others.append(model_hash(changed))
    capped = tiny_student()
    capped.config.rms_norm_eps = 1e-3
    others.append(model_hash(capped))
    assert len({first, *others}) == 5


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the code, which is hashed in place of the project's."""
    for name in ("lolcats_common", "lolcats_core", "kernels"):
        ignored = shutil.ignore_patterns("builtin_teacher", "__pycache__")
        shutil.copytree(results.PROJECT / name, tmp_path / name, ignore=ignored)
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Hash anew: a process asks for the code's hash once."""
    results.code_hash.cache_clear()
    results.measure_hash.cache_clear()


@contextmanager
def edited(file: Path) -> Iterator[None]:
    """One line more inside the block."""
    source = file.read_bytes()
    file.write_bytes(source + b"\n# edited\n")
    forget()
    yield
    file.write_bytes(source)
    forget()


def names(files: set[Path], root: Path) -> set[str]:
    return {file.relative_to(root).as_posix() for file in files}


def test_new_code_in_any_file_behind_linear_layers_makes_old_results_of_students_void(tree: Path) -> None:
    student, teacher, files = tiny_student(), tiny_teacher(), results.code_files()
    before = model_hash(student), model_hash(teacher)
    # What a list kept by hand left out, and what only a function imports.
    missed = {"lolcats_common/linearize_config.py"}
    missed |= {f"lolcats_core/model/{name}.py" for name in ("decoding/static_kv", "rotary", "sinks")}
    lazy = {"kernels/hybrid_attention/fused/output.py", "kernels/softmax_decode/fused.py"}
    assert missed | lazy <= names(files, tree)
    for file in files:
        with edited(file):
            after = model_hash(student), model_hash(teacher)
        assert after[0] != before[0], file
        assert after[1] == before[1], file
    assert (model_hash(student), model_hash(teacher)) == before


def test_new_code_or_data_in_any_file_behind_the_measurements_makes_all_old_results_void(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, files = tmp_path_factory.mktemp("results"), results.measure_files()
    missed = {"lolcats_core/model/branches.py"}
    missed |= {f"lolcats_core/training/{name}.py" for name in ("attention_transfer", "loop")}
    data = {"lolcats_core/evaluation/lm_eval_tasks/needle.yaml"}
    assert missed | data <= names(files, tree)
    assert not files & results.code_files()
    ResultCache(folder).get("recall", {}, lambda: {"value": 1})
    for file in files:
        with edited(file):
            assert ResultCache(folder).get("recall", {}, lambda: {"value": 2}) == {"value": 2}, file
    assert ResultCache(folder).get("recall", {}, lambda: {"value": 2}) == {"value": 1}


def test_new_code_of_who_asks_makes_old_results_void(tmp_path: Path) -> None:
    asking = tmp_path / "asking.py"
    asking.write_text("GAP = 1")
    ResultCache(tmp_path / "kept", [asking]).get("recall", {}, lambda: {"value": 1})
    assert ResultCache(tmp_path / "kept", [asking]).get("recall", {}, lambda: {"value": 2}) == {"value": 1}
    asking.write_text("GAP = 2")
    assert ResultCache(tmp_path / "kept", [asking]).get("recall", {}, lambda: {"value": 2}) == {"value": 2}


def test_the_same_question_is_answered_once_and_a_damaged_answer_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def measure() -> dict[str, Any]:
        asked.append(1)
        return {"value": 0.5}

    cache = ResultCache(tmp_path)
    for _ in range(2):
        assert cache.get("recall", {"model": "a", "gap": 4}, measure) == {"value": 0.5}
    assert len(asked) == 1
    cache.get("recall", {"model": "a", "gap": 8}, measure)
    assert len(asked) == 2
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert cache.get("recall", {"model": "a", "gap": 4}, measure) == {"value": 0.5}
    assert len(asked) == 3
    assert "is damaged; measured again" in caplog.text

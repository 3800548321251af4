"""Kept results belong to one model, one code and one set of settings."""

from __future__ import annotations

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


def test_new_code_of_linear_layers_makes_old_results_of_students_void(monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_hash(tiny_student()), model_hash(tiny_teacher())
    monkeypatch.setattr(results, "code_hash", lambda: "new")
    after = model_hash(tiny_student()), model_hash(tiny_teacher())
    assert before[0] != after[0]
    assert before[1] == after[1]


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

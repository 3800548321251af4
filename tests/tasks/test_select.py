"""The stage `select`: what it leaves to the stages behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from lolcats_common.params import SelectParams
from lolcats_core import LinearizeConfig, linearize, load_feature_maps, save_feature_maps
from lolcats_core.data.rows import TokenRows, TokenRowsWriter
from lolcats_core.model.modeling import feature_maps
from lolcats_core.training.attention_transfer import head_errors
from tasks import select
from tasks.runner.artifacts import selected
from tests.core.tiny import byte_teacher, byte_tokenizer
from tests.tasks.test_evaluate import PARAMS, FakeStage

SETTINGS = LinearizeConfig(window_size=16, feature_dim=8)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A teacher of two layers with two kv groups each, after stage 1."""
    root, teacher = tmp_path / "outputs", byte_teacher()
    (root / "teacher").mkdir(parents=True)
    for name in ("train", "validation"):
        with TokenRowsWriter(root / "prepare" / name, sequence_length=64, vocab_size=257) as writer:
            writer.append(input_ids=torch.randint(1, 257, (4, 64), generator=torch.Generator().manual_seed(0)).numpy())
    student = linearize(teacher, SETTINGS, seed=5)
    save_feature_maps(student, root / "transfer" / "feature_maps.safetensors")
    errors = head_errors(student, TokenRows.open(root / "prepare" / "validation"), 4, 4)
    write_json(root / "transfer" / "errors.json", errors)
    source = SimpleNamespace(
        config=teacher.config, load=lambda dtype, device: byte_teacher(), tokenizer=lambda: byte_tokenizer()
    )
    monkeypatch.setattr(select.Teacher, "open", lambda folder: source)
    made = FakeStage(root, tmp_path, PARAMS)
    made.device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    return made


def after(stage: Any) -> Any:
    """What a later stage sees."""
    (stage.root / "select").symlink_to(stage.out)
    return selected(stage)


@pytest.mark.parametrize("damaged", ['{"0": {"error": [1.0', "[]", ""])
def test_errors_that_are_damaged_are_one_line(stage: Any, damaged: str) -> None:
    (stage.root / "transfer" / "errors.json").write_text(damaged)
    with pytest.raises(UserError, match=r"errors\.json .*; run `dvc repro transfer`"):
        select.run(stage)


def test_without_a_budget_the_maps_and_settings_are_those_of_stage_1(stage: Any) -> None:
    assert select.run(stage) == {"cache_ratio": 0.0, "kept": 0.0}
    settings, maps = after(stage)
    assert settings == SETTINGS
    assert maps.read_bytes() == (stage.root / "transfer" / "feature_maps.safetensors").read_bytes()
    found = json.loads((stage.out / "selection.json").read_text())
    assert (found["criterion"], found["softmax_budget"]) == (None, None)
    assert [entry["kept"] for entry in found["candidates"]] == [None] * 4
    assert (stage.out / "selection.png").is_file()


@pytest.mark.parametrize("criterion", ["transfer_error", "greedy_kl", "even"])
def test_a_later_stage_gets_a_student_that_fits_the_maps(stage: Any, criterion: Any) -> None:
    stage.params = replace(PARAMS, select=SelectParams(softmax_budget={"cache_ratio": 0.25}, criterion=criterion))
    assert select.run(stage) == {"cache_ratio": 0.25, "kept": 1.0}
    settings, maps = after(stage)
    student = linearize(byte_teacher(), settings)
    load_feature_maps(student, maps)
    assert sum(len(each.groups.linear) for each in feature_maps(student).values()) == 3
    found = json.loads((stage.out / "selection.json").read_text())
    assert (found["criterion"], found["softmax_budget"]) == (criterion, {"cache_ratio": 0.25})
    kept = [(entry["layer"], entry["group"]) for entry in found["candidates"] if entry["kept"] is not None]
    assert kept == [(layer, heads[0]) for layer, heads in settings.softmax_heads.items()]
    if criterion != "even":
        assert len(found["candidates"]) == 4
        best = max(found["candidates"], key=lambda entry: entry["score"])
        assert best["kept"] == 0
        assert (stage.out / "selection.png").is_file()


LADDER = ({"size": None, "groups": 1}, {"size": 100})


@pytest.mark.parametrize("rest", [None, 24])
def test_bytes_are_spent_by_retrieval_and_a_later_stage_gets_that_student(stage: Any, rest: int | None) -> None:
    params = SelectParams(
        cache_budget=0.355, cache_length=512, ladder=LADDER, rest=rest, criterion="retrieval", probe_window=20, rows=2
    )
    stage.params = replace(PARAMS, select=params)
    metrics = select.run(stage)
    settings, maps = after(stage)
    student = linearize(byte_teacher(), settings)
    load_feature_maps(student, maps)
    found = json.loads((stage.out / "selection.json").read_text())
    allocation = found["allocation"]
    assert metrics["cache_ratio"] == allocation["bytes"] / allocation["teacher_bytes"] <= 0.355
    assert [set(entry["losses"]) for entry in found["candidates"]] == [{"needle", "copy", "text"}] * 4
    best = max(found["candidates"], key=lambda entry: entry["score"])
    assert allocation["layers"][str(best["layer"])][best["group"]] == "all"
    seen = [size for sizes in allocation["layers"].values() for size in sizes]
    assert sorted(map(str, seen)) == sorted(map(str, ["all", 100, *["linear" if rest is None else rest] * 2]))
    # A layer without any linear group has no maps.
    linear = {layer for layer, sizes in allocation["layers"].items() if "linear" in sizes}
    assert len(feature_maps(student)) == len(linear)
    assert (stage.out / "allocation.png").is_file()
    assert "allocation.png" in stage.figures


@pytest.mark.parametrize("criterion", ["retrieval", "logit_kl", "greedy_kl"])
def test_a_criterion_that_runs_the_teacher_is_refused_where_it_does_not_fit(
    stage: Any, criterion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "device_memory", lambda device: 1e5)
    stage.params = replace(PARAMS, select=SelectParams(softmax_budget={"heads": 0.25}, criterion=criterion))
    with pytest.raises(UserError, match=f"does not fit the memory of cpu .* got {criterion}"):
        select.run(stage)


def test_a_damaged_selection_is_named(stage: Any) -> None:
    (stage.root / "select").mkdir()
    (stage.root / "select" / "selection.json").write_text("{}")
    with pytest.raises(UserError, match=r"selection\.json cannot be read .*run `dvc repro select`"):
        selected(stage)

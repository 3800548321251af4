"""However a student gets into memory, it is the same student, and stage 1 ends in the same maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core import save_feature_maps
from lolcats_core.evaluation.streamed_perplexity import streamed_logits
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import causal_model, open_student
from lolcats_core.teacher import pin
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.loop import TrainResult
from lolcats_core.training.transfer import transfer
from tests.core.teacher.test_pin import make_teacher, pinned
from tests.core.tiny import SETTINGS, FakeRows
from tests.core.training.test_streamed_transfer import CPU, EQUAL

WHERE: dict[str, Any] = {"device": CPU, "dtype": torch.float32}


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    return Teacher.open(pinned(make_teacher(tmp_path / "source"), tmp_path))


def test_a_student_by_layers_has_the_logits_and_parameters_of_the_whole_one(teacher: Teacher, tmp_path: Path) -> None:
    maps, rows = tmp_path / "maps.safetensors", FakeRows(4)
    whole = cast(Any, open_student(teacher, SETTINGS, seed=3, **WHERE))
    save_feature_maps(whole, maps)
    again = cast(Any, open_student(teacher, SETTINGS, seed=4, maps=maps, **WHERE))
    layers = cast(LayerwiseModel, open_student(teacher, SETTINGS, maps=maps, by_layer=True, **WHERE))
    counts = [sum(p.numel() for p in causal_model(each).parameters()) for each in (whole, layers)]
    assert counts[0] == counts[1]
    ((batch, logits),) = streamed_logits(layers, rows, batch_size=4)
    expected = whole(batch["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    assert torch.equal(again(batch["input_ids"], use_cache=False).logits, expected)


def test_stage_1_gives_the_same_maps_and_errors_however_the_student_is_held(teacher: Teacher, tmp_path: Path) -> None:
    rows, validation, logged = FakeRows(24), FakeRows(8, seed=1), list[str]()

    def run(by_layer: bool) -> Any:
        student = open_student(teacher, SETTINGS, seed=3, by_layer=by_layer, **WHERE)
        scratch = tmp_path / str(by_layer)
        return transfer(
            student, rows, validation, EQUAL, scratch=scratch, seed=3, log=lambda metrics, step: logged.extend(metrics)
        )

    (maps, result, errors), (expected, joint, measured) = run(True), run(False)
    assert {"train_loss", "validation_loss"} <= set(logged)
    assert result.best_loss == pytest.approx(joint.best_loss, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value.detach(), rtol=1e-4, atol=1e-5)
    for layer, each in measured.items():
        assert errors[layer] == {name: pytest.approx(values, rel=1e-3) for name, values in each.items()}


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_student_without_linear_layers_has_nothing_to_train(teacher: Teacher, tmp_path: Path, by_layer: bool) -> None:
    settings = LinearizeConfig(softmax_layers=(0, 1))
    student = open_student(teacher, settings, by_layer=by_layer, **WHERE)
    assert transfer(student, FakeRows(8), FakeRows(4), EQUAL, scratch=tmp_path / "run") == ({}, TrainResult(), {})


def test_without_training_the_maps_stay_and_their_errors_are_measured(teacher: Teacher, tmp_path: Path) -> None:
    student = causal_model(open_student(teacher, SETTINGS, seed=3, **WHERE))
    before = {name: p.detach().clone() for name, p in named_map_parameters(student).items()}
    params = dataclasses.replace(EQUAL, enabled=False)
    maps, result, errors = transfer(student, FakeRows(8), FakeRows(4), params, scratch=tmp_path / "run")
    assert all(torch.equal(maps[name], value) for name, value in before.items())
    assert (result.steps, sorted(errors)) == (0, [0, 1])


def test_the_teachers_files_are_compared_once_and_its_shape_is_known_before(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    original = pin.sha256_file
    monkeypatch.setattr(pin, "sha256_file", lambda path: (compared.append(path.name), original(path))[1])
    assert (teacher.config.num_hidden_layers, teacher.context) == (2, 64)
    assert compared == []
    for _ in range(2):
        open_student(teacher, SETTINGS, **WHERE)
    assert sorted(compared) == sorted(teacher.pin.files)

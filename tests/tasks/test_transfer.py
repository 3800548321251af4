"""Stage `transfer` ends in the same maps however it holds the student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.student import causal_model, open_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.loop import TrainResult
from tasks.transfer import train_maps
from tests.core.teacher.test_pin import make_teacher, pinned
from tests.core.tiny import SETTINGS, FakeRows
from tests.core.training.test_streamed_transfer import CPU, EQUAL

WHERE: dict[str, Any] = {"device": CPU, "dtype": torch.float32}


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    return Teacher.open(pinned(make_teacher(tmp_path / "source"), tmp_path))


def test_stage_1_gives_the_same_maps_and_errors_however_the_student_is_held(teacher: Teacher, tmp_path: Path) -> None:
    rows, validation, logged = FakeRows(24), FakeRows(8, seed=1), list[str]()

    def run(by_layer: bool) -> Any:
        student = open_student(teacher, SETTINGS, seed=3, by_layer=by_layer, **WHERE)
        scratch = tmp_path / str(by_layer)
        return train_maps(
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
    assert train_maps(student, FakeRows(8), FakeRows(4), EQUAL, scratch=tmp_path / "run") == ({}, TrainResult(), {})


def test_without_training_the_maps_stay_and_their_errors_are_measured(teacher: Teacher, tmp_path: Path) -> None:
    student = causal_model(open_student(teacher, SETTINGS, seed=3, **WHERE))
    before = {name: p.detach().clone() for name, p in named_map_parameters(student).items()}
    params = dataclasses.replace(EQUAL, enabled=False)
    maps, result, errors = train_maps(student, FakeRows(8), FakeRows(4), params, scratch=tmp_path / "run")
    assert all(torch.equal(maps[name], value) for name, value in before.items())
    assert (result.steps, sorted(errors)) == (0, [0, 1])

"""However a student gets into memory, it is the same student."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lolcats_core import save_feature_maps
from lolcats_core.evaluation.streamed_perplexity import streamed_logits
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import causal_model, open_student
from lolcats_core.teacher import pin
from lolcats_core.teacher.pin import Teacher
from tests.core.teacher.test_pin import make_teacher, pinned
from tests.core.tiny import SETTINGS, FakeRows
from tests.core.training.test_streamed_transfer import CPU

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

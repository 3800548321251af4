"""Every family of vision transformers: kept layers are the teacher, linear ones are the operator, saved ones load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import lolcats_core as lc
from lolcats_core.model.families import VISION
from lolcats_core.model.modeling import feature_maps
from lolcats_core.model.vision.context import prefix_tokens
from lolcats_core.model.vision.modeling import image_layers, observed
from lolcats_kernels.hybrid_attention import bidirectional_weights
from tests.core.tiny_images import MIXED, SETTINGS, TILED, images, output, teacher_classes, tiny_student, tiny_teacher

KINDS = [(family, kind) for family in VISION for kind in range(len(teacher_classes(family)))]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_all_layers_kept_is_the_teacher_bit_for_bit(family: str, kind: int) -> None:
    # Frozen as the student is: torch's own MultiheadAttention (SigLIP's head) computes otherwise where weights train.
    teacher = tiny_teacher(family, kind).requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    student = lc.linearize(teacher, lc.LinearizeConfig(window="none", softmax_layers=(0, 1, 2)))
    batch = images(family, count=3)
    with torch.no_grad():
        expected, found = teacher(**batch), student(**batch)
    assert type(student).__name__ == f"Lolcats{type(teacher).__name__}"
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("settings", [SETTINGS, MIXED, TILED], ids=["linear", "mixed", "tiled"])
def test_linear_heads_are_the_operator_and_kept_ones_are_softmax(family: str, settings: Any) -> None:
    student, batch, seen = tiny_student(family, settings), images(family, count=3), []
    with observed(student, seen.append):
        # Teacher forcing: the pass that shows the layers is the teacher's.
        assert torch.equal(output(student, batch), output(tiny_teacher(family), batch))
    assert len(seen) == len(feature_maps(student))
    assert [call.q.shape[2] for call in seen] == ([4, 4, 4] if settings is SETTINGS else [4, 2])
    shown, layer, outputs = seen[0], image_layers(student)[0], []
    assert shown.grid.prefix == prefix_tokens(student.config)
    weights = bidirectional_weights(shown.q, shown.k, *layer.feature_maps(shown.scores), shown.grid)
    expected = (weights @ shown.v.transpose(1, 2)).transpose(1, 2)
    projection = next((getattr(layer, name) for name in ("o_proj", "out_proj") if hasattr(layer, name)), None)
    if projection is None:
        layer.register_forward_hook(lambda _, args, out: outputs.append(out[0]))
    else:
        projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    output(student, batch)
    real = torch.ones(shown.q.shape[:2], dtype=torch.bool) if shown.real() is None else shown.real()
    assert torch.allclose(outputs[0].unflatten(-1, (4, 8))[real], expected[real], atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_saved_students_load_through_the_auto_classes(family: str, kind: int, tmp_path: Path) -> None:
    student, batch = tiny_student(family, TILED, kind=kind), images(family)
    student.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if kind else AutoModel
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(output(loaded, batch), output(student, batch))
    assert not loaded.linearized.weight.requires_grad
    assert AutoConfig.from_pretrained(tmp_path).linearize == TILED.to_dict()

"""Frozen features: the same for teacher and kept student, padding left out, and classes read from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lolcats_core as lc
from lolcats_core.evaluation.vision.features import (
    ImageFeatures,
    feature_cosines,
    image_features,
    linear_probe,
    nearest_neighbours,
)
from tests.core.tiny_images import images, tiny_student, tiny_teacher


@pytest.mark.parametrize("family", ["dinov2", "siglip_vision_model", "siglip2_vision_model"])
def test_a_student_that_keeps_everything_has_the_teacher_s_features(family: str) -> None:
    teacher = tiny_teacher(family)
    kept = lc.linearize(teacher, lc.LinearizeConfig(window="none", softmax_layers=(0, 1, 2)))
    rows = lc.image_rows(teacher, images(family, 6))
    expected, found = image_features(teacher, rows, 4), image_features(kept, rows, 4)
    assert np.array_equal(found.joined(), expected.joined())
    assert (expected.first is None) == family.startswith("siglip")
    cosines = feature_cosines(image_features(tiny_student(family), rows), expected)
    assert cosines.keys() == ({"patches"} if expected.first is None else {"first", "patches"})
    assert all(-1 <= value < 0.9999 for value in cosines.values())
    assert feature_cosines(found, expected)["patches"] == pytest.approx(1)


def test_padding_does_not_enter_the_mean_of_the_patches() -> None:
    teacher, batch = tiny_teacher("siglip2_vision_model"), images("siglip2_vision_model", 3)
    together = image_features(teacher, lc.image_rows(teacher, batch))
    for row in range(3):
        length = int(batch["pixel_attention_mask"][row].sum())
        names = ("pixel_values", "pixel_attention_mask")
        alone = {name: batch[name][row : row + 1, :length] for name in names}
        alone["spatial_shapes"] = batch["spatial_shapes"][row : row + 1]
        found = image_features(teacher, lc.image_rows(teacher, alone))
        assert torch.allclose(found.patches[0], together.patches[row], atol=1e-5)


def test_probe_and_neighbours_find_classes_that_are_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(60) % 3
    centres = 4 * torch.randn(3, 8, generator=generator)
    noise = torch.randn(60, 8, generator=generator)
    features = ImageFeatures(None, centres[torch.from_numpy(labels)] + 0.1 * noise)
    for method in (linear_probe, nearest_neighbours):
        predict = method(ImageFeatures(None, features.patches[:30]), labels[:30])
        assert (predict(ImageFeatures(None, features.patches[30:])) == labels[30:]).all()

"""The control has no linear branch, no more bytes than the student, and keeps what the student keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lolcats_core import LinearizeConfig, linearize
from lolcats_core.evaluation.control import SINKS, control_settings, loss_differences, window_of
from lolcats_core.model.decoding.state_size import state_size
from lolcats_core.model.modeling import feature_maps
from tests.core.tiny import BOUNDED, MIXED, MIXTURE, RINGS, SETTINGS, tiny_teacher, tokens

STUDENTS = {"plain": SETTINGS, "mixed": MIXED, "bounded": BOUNDED, "mixture": MIXTURE, "rings": RINGS}
DTYPE = torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("settings", STUDENTS.values(), ids=STUDENTS.keys())
def test_the_control_is_the_largest_window_in_the_student_s_bytes(family: str, settings: LinearizeConfig) -> None:
    config = tiny_teacher(family).config
    control = control_settings(config, settings, DTYPE, 200)
    assert control is not None
    budget = state_size(config, settings, DTYPE).at(200)
    assert state_size(config, control, DTYPE).at(200) <= budget
    window = window_of(control, settings, config)
    larger = {
        layer: {group: size + (size == window) for group, size in sizes.items()}
        for layer, sizes in control.softmax_windows.items()
    }
    assert window == 200 or state_size(config, wider(control, larger), DTYPE).at(200) > budget
    assert not feature_maps(linearize(tiny_teacher(family), control))


def wider(control: LinearizeConfig, windows: Any) -> LinearizeConfig:
    return dataclasses.replace(control, softmax_windows=windows)


def test_kept_groups_are_kept_as_they_are() -> None:
    config = tiny_teacher().config
    control = control_settings(config, MIXED, DTYPE, 200)
    assert control is not None
    size = window_of(control, MIXED, config)
    # Layer 1 and group 1 of layer 2 see everything in both.
    assert control.softmax_windows == {0: {0: size, 1: size}, 2: {0: size}}
    assert (control.softmax_layers, control.softmax_sinks) == ((0, 1, 2), SINKS)


@torch.no_grad()
def test_within_its_window_the_control_is_the_teacher_and_beyond_it_is_not() -> None:
    teacher, settings = tiny_teacher(), SETTINGS
    control = control_settings(teacher.config, settings, DTYPE, 200)
    assert control is not None
    size, ids = window_of(control, settings, teacher.config), tokens(1, 150)
    plain = linearize(teacher, control)(ids, use_cache=False).logits
    expected = teacher(ids, use_cache=False).logits
    torch.testing.assert_close(plain[:, :size], expected[:, :size], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain[:, -1], expected[:, -1], atol=1e-3)


def test_there_is_no_control_where_nothing_is_linearized_or_the_bytes_hold_no_window() -> None:
    config = tiny_teacher().config
    whole = LinearizeConfig(softmax_layers=(0, 1, 2))
    small = LinearizeConfig(window_size=4, feature_map="elu", feature_dim=1, window="none", k_map_per="kv_head")
    assert control_settings(config, whole, DTYPE, 200) is None
    assert control_settings(config, small, DTYPE, 200) is None


def test_differences_are_paired_and_leave_out_what_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(2, 511, generator=generator, dtype=torch.float64)
    student = plain - 0.25
    student[:, 300] = float("nan")
    found = loss_differences(student.tolist(), plain.tolist())
    assert [(entry["start"], entry["stop"]) for entry in found] == [(0, 64), (64, 128), (128, 256), (256, 512)]
    for entry in found:
        assert entry["difference"] == pytest.approx(-0.25)
        assert entry["stderr"] == pytest.approx(0, abs=1e-12)
    noisy = loss_differences((plain + torch.rand(2, 511, generator=generator)).tolist(), plain.tolist())
    assert all(0 < entry["stderr"] < 0.1 for entry in noisy)

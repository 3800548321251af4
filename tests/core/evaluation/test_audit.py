"""The audit on students with a known answer: window only, linear only, a broken state, a window that sees all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.evaluation.audit import (
    ablations,
    attention_entropy,
    branch_off,
    head_errors,
    linear_mass,
    probed,
    softmax_off,
)
from lolcats_core.model.modeling import attention_layers, feature_maps
from tests.core.tiny import MIXED, SETTINGS, FakeRows, tiny_student, tiny_teacher, tokens

ROWS = FakeRows(rows=3, length=48)


def whole(student: Any) -> dict[str, Any]:
    return ablations(student, ROWS, batch_size=2, max_rows=3)


def window_only() -> Any:
    """ReLU maps whose bias is far below zero: no key gets any linear weight."""
    student = tiny_student(settings=dataclasses.replace(SETTINGS, feature_map="t2r", feature_map_bias=True))
    with torch.no_grad():
        for maps in feature_maps(student).values():
            maps.b_q.fill_(-1e4)
            maps.b_k.fill_(-1e4)
    return student


def test_a_student_that_leans_on_its_window_is_found_out() -> None:
    student = window_only()
    found = whole(student)
    assert found["linear_off"] == pytest.approx(found["whole"], rel=1e-6)
    assert all(entry["linear_off"] == pytest.approx(found["whole"]) for entry in found["layers"].values())
    assert all(mass < 1e-15 for heads in linear_mass(student, ROWS, 2).values() for mass in heads)
    assert found["window_off"] != pytest.approx(found["whole"], rel=1e-3)


def test_pure_linear_attention_has_no_window_to_lose() -> None:
    student = tiny_student(settings=dataclasses.replace(SETTINGS, window="none"))
    found = whole(student)
    assert found["window_off"] == found["whole"]
    mass = linear_mass(student, ROWS, 2)
    assert all(value == pytest.approx(1, abs=1e-4) for heads in mass.values() for value in heads)


def test_a_broken_state_shows_in_the_layer_that_has_it() -> None:
    student = tiny_student(settings=SETTINGS)
    with branch_off(student, "linear", [1]):
        broken = whole(student)
    intact = whole(student)
    # With its state lost, switching the linear branch off there changes nothing more.
    assert broken["layers"]["1"]["linear_off"] == pytest.approx(broken["whole"], rel=1e-6)
    assert broken["whole"] == intact["layers"]["1"]["linear_off"]
    assert broken["layers"]["0"]["linear_off"] != pytest.approx(broken["whole"], rel=1e-6)


def test_a_window_that_sees_the_whole_row_makes_no_error() -> None:
    student = tiny_student(settings=LinearizeConfig(window_size=64, feature_dim=8))
    errors = head_errors(student, ROWS, 2)
    assert set(errors) == {"0", "1", "2"}
    assert max(value for heads in errors.values() for value in heads) < 1e-10
    assert linear_mass(student, ROWS, 2) == {}
    narrow = head_errors(tiny_student(settings=SETTINGS), ROWS, 2)
    assert min(value for heads in narrow.values() for value in heads) > 1e-4


def test_kept_softmax_heads_are_switched_off_and_come_back() -> None:
    student = tiny_student(settings=MIXED)
    ids = tokens(1, 30)
    before = student(ids).logits
    found = whole(student)
    assert [sorted(entry) for entry in found["layers"].values()] == [
        ["linear_off"],
        ["softmax_off"],
        ["linear_off", "softmax_off"],
    ]
    projection = attention_layers(student)[1].o_proj
    weight = projection.weight.detach().clone()
    with softmax_off(student, 1):
        off = student(ids).logits
    with torch.no_grad():
        projection.weight.zero_()
        assert torch.equal(student(ids).logits, off)
        projection.weight.copy_(weight)
    # Layer 2 keeps its second kv group: columns of the last two of four heads.
    projection = attention_layers(student)[2].o_proj
    with softmax_off(student, 2):
        off = student(ids).logits
    with torch.no_grad():
        projection.weight[:, 16:] = 0
        assert torch.allclose(student(ids).logits, off, atol=1e-6)
        projection.weight.copy_(tiny_student(settings=MIXED).model.layers[2].self_attn.o_proj.weight)
    assert torch.equal(student(ids).logits, before)


def test_mass_and_errors_name_the_linearized_heads_alone() -> None:
    student = tiny_student(settings=MIXED)
    for found in (linear_mass(student, ROWS, 2), head_errors(student, ROWS, 2)):
        assert {layer: len(heads) for layer, heads in found.items()} == {"0": 4, "2": 2}


def test_entropy_is_that_of_the_attention() -> None:
    teacher = tiny_teacher()
    with torch.no_grad():
        attention_layers(teacher)[0].q_proj.weight.zero_()  # every key alike
    entropy = attention_entropy(teacher, ROWS, 2)
    uniform = torch.arange(1, 49).double().log().mean()
    assert entropy["0"] == pytest.approx([float(uniform)] * 4, rel=1e-5)
    assert all(0 < value < float(uniform) for value in entropy["1"])


def test_probes_leave_no_trace() -> None:
    student, ids = tiny_student(), tokens(1, 20)
    before, seen = student(ids).logits, []
    with probed(student, lambda module, *_: seen.append(module.layer_idx)) as watched:
        assert watched
        student(ids)
    assert seen == [0, 1, 2]
    assert torch.equal(student(ids).logits, before)
    assert seen == [0, 1, 2]


def test_a_softcap_and_a_local_window_are_part_of_what_is_probed() -> None:
    student = tiny_student("gemma2", settings=LinearizeConfig(window_size=8, feature_dim=8))
    assert set(linear_mass(student, ROWS, 1)) == {"0", "2"}
    found = ablations(student, ROWS, batch_size=2, max_rows=2)
    assert "softmax_off" in found["layers"]["1"]

"""What is written greedily, on models and texts whose measures are known."""

from __future__ import annotations

import pytest
import torch

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.evaluation.audit import branch_off
from lolcats_core.evaluation.generation import (
    cache_bytes,
    compare_writing,
    continue_greedily,
    prompts,
    repetition,
    shared_prefix,
    token_f1,
    until_end,
)
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.modeling import linearize
from tests.core.tiny import MIXED, FakeRows, tiny_student, tiny_teacher, tokens

END = [2]


@pytest.mark.parametrize("make", [tiny_teacher, tiny_student])
def test_the_text_is_that_of_generate(make: object) -> None:
    model, ids = make(), tokens(3, 20)  # type: ignore[operator]
    written, cost = continue_greedily(model, ids, 12)
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert written == expected[:, 20:].tolist()
    assert all(value > 0 for value in cost.values())


def test_a_linear_models_cache_does_not_grow_and_a_softmax_models_does() -> None:
    teacher, student = tiny_teacher(), tiny_student(settings=MIXED.__class__(window_size=8, feature_dim=8))
    sizes = {
        name: [continue_greedily(model, tokens(2, 20), n)[1]["cache_bytes"] for n in (5, 25)]
        for name, model in (("teacher", teacher), ("student", student))
    }
    assert sizes["student"][0] == sizes["student"][1]
    # Two rows; of 3 layers, keys and values of 2 heads of 8 in float32 for each token but the last one written.
    assert sizes["teacher"] == [2 * 3 * 2 * 2 * 8 * 4 * (20 + n - 1) for n in (5, 25)]
    assert cache_bytes(HybridCache(student.config)) == 0


def test_a_model_agrees_with_itself_and_a_constant_one_repeats() -> None:
    model = tiny_teacher()
    written, _ = continue_greedily(model, tokens(4, 16), 10)
    same = compare_writing(written, written, end=[])
    assert (same["exact_prefix"]["value"], same["token_f1"]["value"], same["same_stop"]["value"]) == (10, 1, 1)
    assert same["stopped_teacher"]["value"] == 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
    constant, _ = continue_greedily(model, tokens(4, 16), 10)
    assert constant == [[0] * 10] * 4
    compared = compare_writing(written, constant, end=[])
    assert compared["repetition_finetuned"] == {"value": 1 - 1 / 7, "stderr": 0.0}
    assert compared["exact_prefix"]["value"] < 10


def test_a_student_with_a_broken_state_writes_the_teachers_text_as_far_as_its_window_reaches() -> None:
    teacher, ids, new = tiny_teacher(), tokens(4, 10), 20
    reference, _ = continue_greedily(teacher, ids, new)
    prefix = {}
    for size in (8, 16):
        student = linearize(teacher, LinearizeConfig(window_size=size, feature_dim=8))
        with branch_off(student, "linear"):
            written, _ = continue_greedily(student, ids, new)
        prefix[size] = [shared_prefix(a, b) for a, b in zip(reference, written, strict=True)]
    # A terraced window of 16 holds all 29 tokens before the last one; one of 8 loses the first of them at the 17th.
    assert prefix[16] == [new] * 4
    assert all(17 - 10 <= length < new for length in prefix[8])


def test_stops_are_compared_where_they_happen() -> None:
    teacher = [[5, 6, 2, 9], [5, 6, 7, 2], [5, 6, 7, 8], [5, 6, 7, 8]]
    student = [[5, 6, 2, 1], [5, 2, 7, 2], [5, 6, 7, 8], [2, 6, 7, 8]]
    found = {name: entry["value"] for name, entry in compare_writing(teacher, student, END).items()}
    assert found["same_stop"] == 0.5
    assert (found["stopped_teacher"], found["stopped_finetuned"]) == (0.5, 0.75)
    assert found["exact_prefix"] == (2 + 1 + 4 + 0) / 4


def test_measures_of_single_texts() -> None:
    assert until_end([4, 5, 2, 6], END) == [4, 5]
    assert until_end([4, 5], END) == [4, 5]
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3]) == 0
    assert token_f1([1, 2, 3, 4], [4, 3, 9, 9]) == 0.5
    assert (token_f1([], []), token_f1([1], [])) == (1, 0)
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2, 4]) == 2


def test_prompts_are_beginnings_of_rows() -> None:
    rows = FakeRows(rows=5, length=40)
    assert torch.equal(prompts(rows, 3, 12), rows.input_ids[:3, :12])
    assert prompts(rows, 9, 100).shape == (5, 20)

"""Recipes side by side: what a row shares, keeps and measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_core.experiments import recipes
from lolcats_core.experiments.recipes import Bench, Measures, Recipe, agreement, budgets, exclude_ids, run, state_bytes
from lolcats_core.training.perplexity import perplexity
from tests.core.tiny import SETTINGS, FakeRows, tiny_student, tiny_teacher

MEASURES = Measures(4, 6, (8, 12), 2, 2, 5, 4, context=100)
TRAINING = {"max_steps": 3, "batch_size": 4, "max_eval_rows": 4}
DEFAULTS: dict[str, Any] = {
    "linearize": {"window_size": 8, "feature_dim": 8},
    "transfer": TRAINING,
    "finetune": {**TRAINING, "lora_rank": 2},
}
KEPT = {"select": {"softmax_budget": {"cache_ratio": 0.2}}}


def bench(folder: Path, **changes: Any) -> Bench:
    teacher = tiny_teacher(**changes)
    return Bench(teacher, FakeRows(24), FakeRows(8, seed=1), MEASURES, folder, exclude_ids(teacher.config))


def test_rows_share_their_maps_and_are_read_when_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = recipes.attention_transfer
    monkeypatch.setattr(recipes, "attention_transfer", lambda *a, **k: (transfers.append(1), original(*a, **k))[1])
    shared = bench(tmp_path)
    before = {name: p.clone() for name, p in shared.teacher.state_dict().items()}
    plain = run(Recipe.of("plain", DEFAULTS, {}), shared, 0)
    kept = run(Recipe.of("kept", DEFAULTS, KEPT), shared, 0)
    assert len(transfers) == 1
    assert run(Recipe.of("kept", DEFAULTS, KEPT), bench(tmp_path), 0) == kept
    run(Recipe.of("plain", DEFAULTS, {}), shared, 1)
    assert len(transfers) == 2
    run(Recipe.of("plain", DEFAULTS, {}), bench(tmp_path, seed=1), 0)
    assert len(transfers) == 3
    # Rows share the teacher's weights, so none of them may change it.
    assert all(torch.equal(before[name], p) for name, p in shared.teacher.state_dict().items())
    assert plain["tokens"] == kept["tokens"] == 2 * 3 * 4 * 40
    assert kept["selection"]["cache_ratio"] == 1 / 6
    assert kept["transferred"]["perplexity"] != plain["transferred"]["perplexity"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_row_measures_the_student_that_its_selection_describes(tmp_path: Path) -> None:
    shared = bench(tmp_path)
    row = run(Recipe.of("kept", DEFAULTS, KEPT), shared, 0, finetune=False)
    heads = row["selection"]["linearize"]["softmax_heads"]
    assert sum(len(groups) for groups in heads.values()) == 1
    assert "finetuned" not in row
    measured = row["transferred"]
    assert set(measured["recall"]) == {"8", "12"}
    assert 0 <= measured["agreement"] <= 1
    assert 0 <= measured["exact_prefix"] <= 1
    assert measured["linear_off"] != measured["audited"] != measured["window_off"]
    everything = {"linearize": {**DEFAULTS["linearize"], "softmax_layers": [0, 1, 2]}, "transfer": {"enabled": False}}
    teacher = run(Recipe.of("softmax", DEFAULTS, everything), shared, 0, finetune=False)["transferred"]
    expected = perplexity(shared.teacher, shared.validation_rows, batch_size=4, max_rows=6).perplexity
    assert teacher["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert teacher["perplexity"] == pytest.approx(shared.teacher_row["perplexity"], rel=1e-5)
    assert (teacher["agreement"], teacher["exact_prefix"], teacher["state"]["share"]) == (1.0, 1.0, 1.0)
    assert (teacher["linear_off"], teacher["window_off"]) == (None, None)


def test_agreement_is_the_share_of_equal_predictions() -> None:
    teacher, student, rows = tiny_teacher(), tiny_student(settings=SETTINGS), FakeRows(5)
    with torch.no_grad():
        ids = rows.batch(range(5))["input_ids"]
        same = teacher(ids).logits[:, :-1].argmax(-1) == student(ids, use_cache=False).logits[:, :-1].argmax(-1)
    assert agreement(teacher, student, rows, 5, 2) == pytest.approx(same.double().mean().item())
    assert agreement(teacher, teacher, rows, 3, 2) == 1.0


def test_the_state_is_constant_and_what_keeps_softmax_grows(tmp_path: Path) -> None:
    shared = bench(tmp_path)
    settings = dataclasses.replace(SETTINGS, softmax_heads={1: (0,)})
    state = state_bytes(lc.linearize(shared.teacher, settings), shared)
    token = 2 * 8 * 4  # k and v of one kv head of 8 in float32
    assert state["per_token"] == token
    # k and v of the two chunks of eight for two kv heads; S and z of four query heads; the number of tokens.
    ring, sums, length = 2 * 16 * 2 * 8 * 4, 4 * 16 * (8 + 1) * 4, 8
    assert state["constant"] == 2.5 * (ring + sums) + 3 * length
    assert state["bytes"] == state["constant"] + 100 * token
    assert state["share"] == pytest.approx(state["bytes"] / (100 * 6 * token))
    assert state_bytes(shared.teacher, shared)["share"] == 1.0


def test_overrides_that_are_no_recipe_are_refused() -> None:
    with pytest.raises(UserError, match="recipe 'a': sections are linearize, transfer, select, finetune, got 'data'"):
        Recipe.of("a", DEFAULTS, {"data": {"source": "x"}})
    with pytest.raises(UserError, match=r"recipe .a.: unknown key `transfer\.lrr`"):
        Recipe.of("a", DEFAULTS, {"transfer": {"lrr": 1}})


def test_budgets_are_recipes_by_cache_ratio() -> None:
    base = Recipe.of("base", DEFAULTS, {"select": {"criterion": "greedy_kl"}})
    points = budgets(base, (0.5, 0.0, 0.25))
    assert [point.name for point in points] == ["0", "0.25", "0.5"]
    assert [point.params.select.softmax_budget for point in points] == [
        None,
        {"cache_ratio": 0.25},
        {"cache_ratio": 0.5},
    ]
    assert all(point.params.select.criterion == "greedy_kl" for point in points)

"""What keeps softmax attention: budgets, criteria, and the student that a choice makes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import ParamsError, SelectParams, TransferParams, params_from_dict
from lolcats_core.evaluation import audit
from lolcats_core.model.map_files import restrict_maps
from lolcats_core.model.modeling import attention_layers, named_map_parameters
from lolcats_core.training.attention_transfer import head_errors, transfer_losses
from lolcats_core.training.losses import KL
from lolcats_core.training.low_rank_finetune import next_token_loss
from lolcats_core.training.selection import (
    Candidate,
    all_groups,
    candidates,
    choose_softmax,
    keeping,
    kept_groups,
    student_divergence,
    transfer_scores,
)
from tests.core.tiny import SETTINGS, FakeRows, tiny_student, tiny_teacher, tokens

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIG = tiny_teacher(**FOUR).config  # 3 layers of 4 kv groups of 2 query heads
ERRORS = {
    layer: {"error": [layer + 0.1 * head for head in range(8)], "power": [float(1 + layer) ** 2] * 8}
    for layer in range(3)
}


def names(kept: tuple[Candidate, ...]) -> list[Any]:
    return [c.layer if c.group is None else (c.layer, c.group) for c in kept]


def chosen(budget: dict[str, float], criterion: str, **options: Any) -> Any:
    params = SelectParams(softmax_budget=budget, criterion=criterion)  # type: ignore[arg-type]
    return choose_softmax(params, SETTINGS, CONFIG, ERRORS, **options)


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ({"layers": 1}, 1),
        ({"heads": 0.25}, 3),
        ({"heads": 0.2}, 2),
        ({"cache_ratio": 0.25}, 3),
        ({"cache_ratio": 0.2}, 2),
        ({"cache_ratio": 1 / 12}, 1),
    ],
)
def test_a_budget_keeps_that_much_of_the_cache(budget: dict[str, float], count: int) -> None:
    selection = chosen(budget, "transfer_error")
    assert len(selection.kept) == count
    groups = kept_groups(selection.settings, CONFIG)
    assert selection.cache_ratio == len(groups) / 12
    assert len(groups) == (4 * count if "layers" in budget else count)
    if "cache_ratio" in budget:
        assert selection.cache_ratio <= budget["cache_ratio"] + 1e-9


def test_without_a_budget_the_settings_pass_as_they_are() -> None:
    settings = dataclasses.replace(SETTINGS, softmax_layers=(1,), softmax_heads={2: (0, 3)})
    selection = choose_softmax(SelectParams(), settings, CONFIG, {})
    assert selection.settings == settings
    assert (selection.kept, selection.scores, selection.cache_ratio) == ((), {}, 0.5)


@pytest.mark.parametrize(
    ("budget", "changes", "message"),
    [
        ({"layers": 3}, {}, "must keep between 1 and 2 of 3 layers, got layers 3, which keeps 3"),
        ({"cache_ratio": 0.05}, {}, "between 1 and 11 of 12 kv groups, got cache_ratio 0.05, which keeps 0"),
        ({"layers": 1}, {"softmax_layers": (0,)}, "must be null where `linearize` names softmax layers"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(budget: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_softmax(SelectParams(softmax_budget=budget), dataclasses.replace(SETTINGS, **changes), CONFIG, ERRORS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"softmax_budget": {"layer": 1}}, "must be null or have one key, layers, heads or cache_ratio"),
        ({"softmax_budget": {"layers": 1, "heads": 0.5}}, "must be null or have one key"),
        ({"softmax_budget": {"layers": 1.5}}, "`softmax_budget.layers` must be at least 1"),
        ({"softmax_budget": {"cache_ratio": 1.0}}, r"`softmax_budget.cache_ratio` must lie in \(0, 1\), got 1.0"),
        ({"criterion": "kl"}, "`select.criterion` must be one of"),
    ],
)
def test_wrong_parameters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"select": values})


def test_keeping_and_kept_groups_are_inverses() -> None:
    groups = all_groups(CONFIG)
    assert len(groups) == 12
    for kept in itertools.chain(itertools.combinations(groups, 3), [tuple(groups[4:8]), tuple(groups[:6])]):
        settings = keeping(SETTINGS, kept, CONFIG)
        assert kept_groups(settings, CONFIG) == frozenset(kept)
        lc.linearize(tiny_teacher(**FOUR), settings)
    assert keeping(SETTINGS, groups[4:8], CONFIG).softmax_layers == (1,)


def test_local_layers_are_no_candidates() -> None:
    config = tiny_teacher("gemma3_text").config  # the middle layer is local
    assert {layer for layer, _ in all_groups(config)} == {0, 2}
    assert [c.layer for c in candidates(SelectParams(softmax_budget={"layers": 1}), config)] == [0, 2]


def test_scores_are_the_candidates_own_heads() -> None:
    layers = candidates(SelectParams(softmax_budget={"layers": 1}), CONFIG)
    groups = candidates(SelectParams(softmax_budget={"heads": 0.5}), CONFIG)
    raw = transfer_scores(layers, ERRORS, 4, normalized=False)
    assert [raw[c] for c in layers] == pytest.approx([0.35, 1.35, 2.35])
    normal = transfer_scores(layers, ERRORS, 4, normalized=True)
    assert [normal[c] for c in layers] == pytest.approx([0.35, 1.35 / 4, 2.35 / 9])
    by_group = transfer_scores(groups, ERRORS, 4, normalized=False)
    assert [by_group[c] for c in groups[4:8]] == pytest.approx([1.05, 1.25, 1.45, 1.65])


def test_the_criteria_without_a_model() -> None:
    assert names(chosen({"layers": 2}, "transfer_error").kept) == [2, 1]
    assert names(chosen({"layers": 2}, "normalized_transfer_error").kept) == [0, 1]
    assert names(chosen({"heads": 0.25}, "transfer_error").kept) == [(2, 3), (2, 2), (2, 1)]
    assert names(chosen({"layers": 2}, "even").kept) == [0, 2]
    assert names(chosen({"heads": 0.25}, "even").kept) == [(0, 2), (1, 2), (2, 2)]
    draws = {tuple(names(chosen({"heads": 0.25}, "random", seed=seed).kept)) for seed in range(20)}
    assert len(draws) > 10
    assert names(chosen({"heads": 0.25}, "random", seed=3).kept) == names(
        chosen({"heads": 0.25}, "random", seed=3).kept
    )


def test_the_lazy_greedy_choice_is_the_greedy_one_with_fewer_measurements() -> None:
    """Overlapping sets: what a group adds shrinks as others are kept (submodular), as the lazy form assumes."""
    generator = torch.Generator().manual_seed(0)
    covers = {group: set(torch.randint(0, 40, (9,), generator=generator).tolist()) for group in all_groups(CONFIG)}
    calls = 0

    def divergence(kept: frozenset[Any]) -> float:
        nonlocal calls
        calls += 1
        return 40.0 - len(set().union(*(covers[group] for group in kept)))

    expected: list[Any] = []
    for _ in range(6):
        left = [group for group in covers if group not in expected]
        expected.append(min(left, key=lambda group: divergence(frozenset([*expected, group]))))
    plain, calls = calls, 0
    selection = chosen({"heads": 0.5}, "greedy_kl", divergence=divergence)
    reached = divergence(frozenset(names(selection.kept)))
    assert reached == divergence(frozenset(expected))
    assert calls < 0.7 * plain


def test_one_at_a_time_measures_what_is_lost_with_one_candidate_linear() -> None:
    asked = []

    def divergence(kept: frozenset[Any]) -> float:
        asked.append(frozenset(all_groups(CONFIG)) - kept)
        ((layer, group),) = asked[-1]
        return float((layer, group) == (1, 2))

    assert names(chosen({"heads": 0.1}, "logit_kl", divergence=divergence).kept) == [(1, 2)]
    assert len(set(asked)) == 12


@pytest.mark.parametrize("criterion", ["logit_kl", "greedy_kl"])
def test_the_kl_criteria_find_the_group_that_the_logits_depend_on(criterion: str) -> None:
    teacher = tiny_teacher(**FOUR)
    with torch.no_grad():
        for layer in attention_layers(teacher):
            columns = layer.o_proj.weight.unflatten(1, (4, -1))
            for group in range(4):
                if (layer.layer_idx, group) != (1, 2):
                    columns[:, group] *= 1e-3
    student = lc.linearize(teacher, SETTINGS)
    divergence = student_divergence(teacher, student, FakeRows(4), 4, 2)
    selection = chosen({"cache_ratio": 0.1}, criterion, divergence=divergence)
    assert names(selection.kept) == [(1, 2)]
    assert selection.settings.softmax_heads == {1: (2,)}


@pytest.mark.parametrize("documents", [False, True])
def test_the_divergence_is_the_student_s(documents: bool) -> None:
    teacher = tiny_teacher(**FOUR)
    student, rows = tiny_student(settings=SETTINGS, **FOUR), FakeRows(5, documents=documents)
    divergence = student_divergence(teacher, student, rows, 4, 4)
    with torch.no_grad():
        expected = next_token_loss(student, rows.batch(range(4)), KL).item()
    assert divergence(frozenset()) == pytest.approx(expected, rel=1e-4)
    assert divergence(frozenset(all_groups(CONFIG))) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"k_map_per": "kv_head"}, {"feature_map_bias": True}])
@torch.no_grad()
def test_restricted_maps_are_the_same_functions_of_the_groups_that_stay_linear(changes: dict[str, Any]) -> None:
    whole = tiny_student(settings=dataclasses.replace(SETTINGS, **changes), **FOUR)
    kept = keeping(dataclasses.replace(SETTINGS, **changes), [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)], CONFIG)
    model = lc.linearize(tiny_teacher(**FOUR), kept)
    for name, value in restrict_maps(named_map_parameters(whole), whole, model).items():
        model.get_parameter(name).copy_(value)
    errors, expected = (head_errors(each, FakeRows(3), 3, 3) for each in (model, whole))
    assert errors.keys() == {0, 2}
    linear = {0: [0, 1, 6, 7], 2: list(range(8))}
    for layer, heads in linear.items():
        for key in ("error", "power"):
            assert errors[layer][key] == pytest.approx([expected[layer][key][head] for head in heads], rel=1e-5)


def test_head_errors_are_the_transfer_loss_taken_apart() -> None:
    for documents in (False, True):
        student, rows = tiny_student(settings=SETTINGS, **FOUR), FakeRows(3, documents=documents)
        losses = transfer_losses(student, rows.batch(range(3)), TransferParams())
        errors = head_errors(student, rows, 3, 2)
        for layer, each in errors.items():
            assert sum(each["error"]) / 8 == pytest.approx(losses[f"layer_{layer:03d}"].item(), rel=1e-4)
    rows = FakeRows(3)
    ratios = audit.head_errors(student, rows, 3)
    for layer, each in head_errors(student, rows, 3, 1).items():
        assert ratios[str(layer)] == pytest.approx([e / p for e, p in zip(each["error"], each["power"], strict=True)])
    seen: list[torch.Tensor] = []
    teacher = tiny_teacher(**FOUR)
    attention_layers(teacher)[2].o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(rows.batch(range(3))["input_ids"], use_cache=False)
    power = seen[0].unflatten(-1, (8, 8)).square().mean((0, 1, 3))
    assert head_errors(student, rows, 3, 3)[2]["power"] == pytest.approx(power.tolist(), rel=1e-4)


@torch.no_grad()
def test_the_chosen_student_s_cache_is_as_small_as_the_budget_says() -> None:
    teacher, ids = tiny_teacher(**FOUR), tokens(1, 64)
    selection = chosen({"cache_ratio": 0.25}, "transfer_error")
    cache = lc.linearize(teacher, selection.settings)(ids, use_cache=True).past_key_values
    whole = sum(2 * layer.keys.numel() * 4 for layer in teacher(ids, use_cache=True).past_key_values.layers)
    assert cache.softmax_bytes() == 0.25 * whole

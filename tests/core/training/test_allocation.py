"""Bytes as the budget: the sizes that a ladder gives the kv groups, and the student that comes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import ParamsError, SelectParams, params_from_dict
from lolcats_common.training_params import Criterion
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.state_size import state_size, teacher_size
from lolcats_core.training.allocation import all_groups, allocate
from lolcats_core.training.ranking.criteria import CRITERIA, Evidence, rank
from lolcats_core.training.selection import candidates, choose_softmax
from tests.core.tiny import decode, tiny_teacher, tokens

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}
# Every map per kv head and few features: linear groups cost less than 40 tokens.
SMALL = lc.LinearizeConfig(window_size=8, feature_dim=2, k_map_per="kv_head")
CONFIG = tiny_teacher(**FOUR).config  # 3 layers of 4 kv groups, context 256


def params(**changes: Any) -> SelectParams:
    values: dict[str, Any] = {"cache_budget": 0.3, "ladder": ({"size": None, "groups": 1}, {"size": 60}), **changes}
    return SelectParams(**values)


def smollm() -> Any:
    """The shape of SmolLM2-135M: 30 layers of 3 kv heads of 64, context 8192."""
    return SimpleNamespace(
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=576,
        head_dim=64,
        max_position_embeddings=8192,
    )


@pytest.mark.parametrize("rest", [None, 12])
@pytest.mark.parametrize("budget", [0.25, 0.28, 0.3])
def test_the_last_rung_is_given_as_often_as_the_bytes_allow(budget: float, rest: int | None) -> None:
    order = all_groups(CONFIG)[::-1]
    found = allocate(order, params(cache_budget=budget, rest=rest), SMALL, CONFIG, torch.float32)
    assert found.length == 256
    assert found.bytes == state_size(CONFIG, found.settings, torch.float32).at(256)
    assert found.teacher_bytes == teacher_size(CONFIG, torch.float32).at(256)
    assert found.share <= budget
    sizes = [found.sizes.get(group, "linear") for group in order]
    count = sizes.count(60)
    assert sizes == [None, *[60] * count, *["linear" if rest is None else rest] * (11 - count)]
    # One ring more would not fit.
    more = ({"size": None, "groups": 1}, {"size": 60, "groups": count + 1}, {"size": 60})
    with pytest.raises(UserError, match="with no group on its last rung"):
        allocate(order, params(cache_budget=budget, rest=rest, ladder=more), SMALL, CONFIG, torch.float32)


def test_the_measured_ladders_on_their_teacher() -> None:
    """A terraced window of n holds 1.5 n tokens on average; ours slides, so the same bytes are a size of 1.5 n."""
    config, order = smollm(), all_groups(smollm())
    eight = SelectParams(cache_budget=0.08, rest=372)
    found = allocate(order, eight, lc.LinearizeConfig(), config, torch.bfloat16)
    sizes = list(found.sizes.values())
    assert [sizes.count(size) for size in (None, 1536, 372)] == [2, 8, 80]
    assert found.share == pytest.approx(0.0797, abs=2e-4)
    ladder = ({"size": None, "groups": 4}, {"size": 3072, "groups": 8}, {"size": 1536})
    sixteen = SelectParams(cache_budget=0.145, rest=384, ladder=ladder)
    sizes = list(allocate(order, sixteen, lc.LinearizeConfig(), config, torch.bfloat16).sizes.values())
    assert [sizes.count(size) for size in (None, 3072, 1536, 384)] == [4, 8, 16, 62]
    constant = SelectParams(cache_budget=0.061, rest=204, ladder=({"size": 3072},))
    found = allocate(order, constant, lc.LinearizeConfig(), config, torch.bfloat16)
    assert list(found.sizes.values()).count(3072) == 9
    assert state_size(config, found.settings, torch.bfloat16).per_token == 0


@pytest.mark.parametrize("rest", [None, 12])
@torch.no_grad()
def test_the_allocated_student_has_those_bytes_and_decodes(rest: int | None) -> None:
    teacher, scores = tiny_teacher(**FOUR), {}
    chosen = params(rest=rest, cache_length=100, criterion="random")
    selection = choose_softmax(chosen, SMALL, teacher.config, {}, seed=3, dtype=torch.float32)
    scores = selection.scores
    order = sorted(scores, key=lambda candidate: -scores[candidate])
    assert list(selection.kept) == order[: len(selection.kept)]
    model, ids = lc.linearize(teacher, selection.settings), tokens(1, 100)
    cache = HybridCache(model.config)
    expected = model(ids, use_cache=False).logits
    model(ids, past_key_values=cache)
    allocation = selection.allocation
    assert allocation is not None
    assert cache.state_bytes() + cache.softmax_bytes() == allocation.bytes
    torch.testing.assert_close(decode(model, ids, 70), expected, rtol=1e-4, atol=1e-5)
    record = selection.to_dict(chosen)
    assert record["cache_ratio"] == allocation.bytes / allocation.teacher_bytes
    layers = record["allocation"]["layers"]
    assert [len(seen) for seen in layers.values()] == [4, 4, 4]
    first = selection.kept[0]
    assert layers[str(first.layer)][first.group or 0] == "all"
    assert sum(seen.count("linear" if rest is None else rest) for seen in layers.values()) == 12 - len(
        [size for size in allocation.sizes.values() if size in (None, 60)]
    )


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"cache_budget": 0.05}, {}, r"`select.cache_budget` must be at least 0\.\d+ with this ladder: 0.05 of the"),
        ({}, {"softmax_layers": (0,)}, "`select.cache_budget` must be null where `linearize` names softmax layers"),
        ({}, {"softmax_window": 9}, "must be null where `linearize` names softmax layers or heads or `softmax_window`"),
        (
            {"ladder": ({"size": None, "groups": 13}, {"size": 9})},
            {},
            "`select.ladder` must not name more than the 12 kv groups, got 13",
        ),
    ],
)
def test_what_the_bytes_do_not_buy_is_refused(changes: Any, settings: Any, message: str) -> None:
    made = lc.LinearizeConfig(**SMALL.to_dict() | settings)
    with pytest.raises(UserError, match=message):
        allocate(all_groups(CONFIG), params(**changes), made, CONFIG, torch.float32)


def test_a_ring_as_wide_as_the_teacher_s_own_window_is_refused() -> None:
    config = tiny_teacher("mistral", sliding_window=60).config
    with pytest.raises(UserError, match="below the teacher's own sliding window of 60, got 60"):
        allocate(all_groups(config), params(), SMALL, config, torch.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_budget": 1.0}, r"`cache_budget` must lie in \(0, 1\), got 1.0"),
        ({"cache_budget": 0.1, "softmax_budget": {"layers": 1}}, "`softmax_budget` must be null with `cache_budget`"),
        ({"cache_budget": 0.1, "criterion": "even"}, "`criterion` must rank for `cache_budget`, got 'even'"),
        ({"ladder": []}, r"`ladder` must have a rung, got \[\]"),
        ({"ladder": [{"groups": 2}]}, r"`ladder\[0\]` must have the key size and may have groups"),
        ({"ladder": [{"size": 9, "group": 2}]}, r"`ladder\[0\]` must have the key size and may have groups"),
        ({"ladder": [{"size": 9}, {"size": 8}]}, r"`ladder\[0\]`: only the last rung has no groups"),
        ({"ladder": [{"size": 9, "groups": 1}]}, r"`ladder\[0\]`: only the last rung has no groups, got 1"),
        ({"ladder": [{"size": 4}]}, r"size must be null or at least 2 and above `first_tokens` \(4\), got 4"),
        ({"rest": 4}, r"`rest` must be null or at least 2 and above `first_tokens` \(4\), got 4"),
        ({"probe_length": 300}, r"`probe_length` must be null or above twice `probe_window` \(192\), got 300"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"select": values})


def test_every_criterion_of_the_parameters_is_in_the_table_and_no_other_ranks() -> None:
    assert set(CRITERIA) == set(get_args(Criterion))
    every = candidates(SelectParams(), CONFIG)
    with pytest.raises(ValueError, match=r"a criterion must be one of transfer_error, .* got 'transfer_eror'"):
        rank("transfer_eror", Evidence(every, 1, {}, 4))
    for criterion in ("retrieval", "logit_kl", "greedy_kl"):
        with pytest.raises(ValueError, match=f"criterion {criterion} needs"):
            rank(criterion, Evidence(every, 1, {}, 4))

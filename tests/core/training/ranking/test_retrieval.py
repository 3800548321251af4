"""What single kv groups of a teacher retrieve: the probes, and the loss with one group cut to a window."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import SelectParams
from lolcats_core.data.special_tokens import special_ids
from lolcats_core.model.modeling import attention_layers
from lolcats_core.model.softmax_attention import SoftmaxWindow
from lolcats_core.training.ranking.probes import SKIPPED, Probe, make_probes
from lolcats_core.training.ranking.retrieval import cut_losses, retrieval_of
from lolcats_core.training.selection import all_groups, choose_softmax
from tests.core.tiny import FakeRows, byte_tokenizer, tiny_teacher, tiny_tokenizer, tokens

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}
WINDOW = SoftmaxWindow(9, 3)


class Text(FakeRows):
    """Rows of text as bytes."""

    def __init__(self, length: int = 64) -> None:
        super().__init__(rows=12, length=length)
        self.input_ids = self.input_ids + 60


@pytest.mark.parametrize("bos", [False, True])
def test_probes_are_longer_than_the_rows_and_ask_for_what_lies_beyond_the_reach(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    made = make_probes(Text(), tokenizer, 300, count=6, length=200, reach=40, seed=0)
    needle, copy, text = made
    assert [probe.name for probe in made] == ["needle", "copy", "text"]
    assert [len(probe.input_ids) for probe in made] == [6, 3, 3]
    begin = [tokenizer.bos_token_id] if bos else []
    for row, counted in zip(needle.input_ids, needle.counted, strict=True):
        assert len(row) == 200
        assert row[: len(begin)].tolist() == begin
        (places,) = counted.nonzero(as_tuple=True)
        assert places.tolist() == list(range(int(places[0]), 199))
        answer = tokenizer.decode(row[places + 1])
        assert len(answer) == 6
        assert answer[1:].isdigit()
        said = tokenizer.decode(row)
        assert said.count(answer) == 2
        # The number was last seen further back than a cut group sees.
        before = tokenizer.decode(row[: int(places[0]) + 1 - 40])
        assert answer in before
    string = (copy.input_ids.shape[1] - len(begin)) // 2
    first, second = copy.input_ids[:, len(begin) :].split(string, 1)
    assert torch.equal(first, second)
    assert not set(special_ids(tokenizer)) & set(first.flatten().tolist())
    assert copy.counted.sum().item() == 3 * (string - SKIPPED - 1)
    assert text.counted.sum().item() == 3 * 100
    again = make_probes(Text(), tokenizer, 300, count=6, length=200, reach=40, seed=0)
    other = make_probes(Text(), tokenizer, 300, count=6, length=200, reach=40, seed=1)
    for a, b, c in zip(made, again, other, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert not torch.equal(a.input_ids, c.input_ids)
    # More rows add some and change none.
    more = make_probes(Text(), tokenizer, 300, count=8, length=200, reach=40, seed=0)[0]
    assert torch.equal(more.input_ids[:6], needle.input_ids)


def test_a_row_too_short_for_a_needle_beyond_the_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"must leave room for a needle further than 90 .* got 120"):
        make_probes(Text(), byte_tokenizer(), 257, count=1, length=120, reach=90, seed=0)


def probes(length: int = 40) -> tuple[Probe, ...]:
    counted = torch.zeros(5, length, dtype=torch.bool)
    counted[:, length // 2 : -1] = True
    return (Probe("needle", tokens(5, length), counted), Probe("text", tokens(2, length, seed=1), counted[:2]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "olmo2"])
@torch.no_grad()
def test_a_cut_is_the_student_in_which_that_group_alone_has_the_window(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, the layers that are not run again, and the positions that count change nothing."""
    monkeypatch.setattr("lolcats_core.training.ranking.retrieval.TOKENS", 80)
    teacher = tiny_teacher(family)
    cuts = [frozenset({(0, 0)}), frozenset({(2, 1)}), frozenset({(2, 0), (2, 1)})]
    found = cut_losses(teacher, probes(), cuts, WINDOW)
    for cut, losses in zip(cuts, found, strict=True):
        ((layer, *_),) = [sorted({layer for layer, _ in cut})]
        settings = lc.LinearizeConfig(
            softmax_layers=(0, 1, 2), softmax_windows={layer: {head: 9 for _, head in cut}}, softmax_sinks=3
        )
        student = lc.linearize(teacher, settings)
        for probe in probes():
            wanted, given = (
                model(probe.input_ids, use_cache=False).logits[probe.counted].log_softmax(-1)
                for model in (teacher, student)
            )
            expected = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
            assert losses[probe.name] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert expected > 1e-5


def test_the_criterion_finds_the_group_that_the_text_beyond_the_window_needs() -> None:
    teacher = tiny_teacher(vocab_size=300, max_position_embeddings=512, **FOUR)
    with torch.no_grad():
        for layer in attention_layers(teacher):
            columns = layer.o_proj.weight.unflatten(1, (4, -1))
            for group in range(4):
                if (layer.layer_idx, group) != (1, 2):
                    columns[:, group] *= 1e-2
    params = SelectParams(
        softmax_budget={"heads": 0.1}, criterion="retrieval", rows=2, probe_window=20, probe_length=200
    )
    retrieval = retrieval_of(teacher, Text(), tiny_tokenizer(), params, 0)
    settings = lc.LinearizeConfig(window_size=8, feature_dim=8)
    selection = choose_softmax(params, settings, teacher.config, {}, retrieval=retrieval)
    assert selection.settings.softmax_heads == {1: (2,)}
    assert sum(selection.scores.values()) == pytest.approx(3.0)
    assert len(selection.scores) == len(all_groups(teacher.config))
    record = selection.to_dict(params)
    assert record["criterion"] == "retrieval"
    assert all(set(entry["losses"]) == {"needle", "copy", "text"} for entry in record["candidates"])
    assert choose_softmax(params, settings, teacher.config, {}, retrieval=retrieval).scores == selection.scores
    # Without a length, twice the rows and no more than the context.
    short = dataclasses.replace(params, probe_length=None)
    asked: list[int] = []

    def seen(_: Any, made: tuple[Probe, ...], cuts: Any, __: Any) -> list[dict[str, float]]:
        asked.extend(probe.input_ids.shape[1] for probe in made)
        return [{"needle": 1.0} for _ in cuts]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("lolcats_core.training.ranking.retrieval.cut_losses", seen)
        retrieval_of(teacher, Text(90), tiny_tokenizer(), short, 0)([frozenset({(0, 0)})])
    assert asked == [180, 180, 180]


def test_a_window_that_cuts_nothing_is_refused() -> None:
    cut = [frozenset({(0, 0)})]
    with pytest.raises(UserError, match=r"`select.probe_window` must be below the teacher's own sliding window of 9"):
        cut_losses(tiny_teacher("mistral", sliding_window=9), probes(), cut, WINDOW)
    with pytest.raises(UserError, match=r"above twice `select.probe_window` \(20\), got 40"):
        cut_losses(tiny_teacher(), probes(), cut, SoftmaxWindow(20, 3))
    with pytest.raises(UserError, match="needs the teacher's tokenizer"):
        retrieval_of(tiny_teacher(), Text(), None, SelectParams(), 0)

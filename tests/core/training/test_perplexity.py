"""Perplexity against answers that are known in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_core.model import forward
from lolcats_core.training.perplexity import bigram_perplexity, next_token_targets, perplexity


class ListRows:
    """Rows held in memory."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns
        self.sequence_length = columns["input_ids"].shape[1]

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def batch(self, indices: range) -> dict[str, Tensor]:
        return {name: column[list(indices)] for name, column in self.columns.items()}


class TableModel(nn.Module):
    """Next-token log-probabilities looked up by the present token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(vocab_size=table.shape[1])
        self.calls: list[dict] = []

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        self.calls.append({"rows": len(input_ids), **kwargs})
        return SimpleNamespace(logits=self.table[input_ids])


def tokens(rows: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab, size=(rows, length)))


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    result = perplexity(TableModel(torch.zeros(50, 50)), ListRows(input_ids=tokens(7, 9, 50)), batch_size=2)
    assert result.perplexity == pytest.approx(50, rel=1e-6)
    assert result.tokens == 7 * 8
    assert result.bits == pytest.approx(math.log2(50), rel=1e-6)


def test_the_loss_equals_a_float64_reference() -> None:
    table, ids = torch.randn(11, 11, generator=torch.Generator().manual_seed(0)), tokens(5, 13, 11)
    log_p = table.double().log_softmax(-1)[ids[:, :-1]]
    expected = -log_p.gather(-1, ids[:, 1:, None]).mean().item()
    assert perplexity(TableModel(table), ListRows(input_ids=ids), batch_size=3).loss == pytest.approx(
        expected, rel=1e-6
    )


def test_only_masked_in_targets_and_no_first_tokens_of_documents_count() -> None:
    batch = {
        "input_ids": tokens(1, 6, 9),
        "loss_mask": torch.tensor([[True, True, False, True, True, True]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    _, counted = next_token_targets(batch)
    assert counted.tolist() == [[True, False, False, True, True]]
    model = TableModel(torch.zeros(9, 9))
    assert perplexity(model, ListRows(**batch), batch_size=1).tokens == 3
    assert torch.equal(model.calls[0]["position_ids"], batch["position_ids"])


def test_targets_that_do_not_count_may_predict_nan() -> None:
    table = torch.zeros(4, 4)
    table[3] = float("nan")
    rows = ListRows(input_ids=torch.tensor([[0, 1, 3, 2]]), loss_mask=torch.tensor([[True, True, True, False]]))
    assert perplexity(TableModel(table), rows, batch_size=1).perplexity == pytest.approx(4)


def test_a_nan_loss_is_refused_with_the_model_named() -> None:
    table = torch.zeros(4, 4)
    table[3] = float("nan")
    rows = ListRows(input_ids=torch.tensor([[0, 1], [1, 2], [0, 1], [3, 0]]))
    with pytest.raises(UserError, match="the loss of the student is nan in rows 2 to 3"):
        perplexity(TableModel(table), rows, batch_size=2, name="the student")


def test_splitting_the_logits_changes_neither_tokens_nor_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = torch.randn(11, 11, generator=torch.Generator().manual_seed(0)), ListRows(input_ids=tokens(5, 13, 11))
    whole = perplexity(TableModel(table), rows, batch_size=4)
    monkeypatch.setattr(forward, "MAX_LOGITS", 2 * 13 * 11)
    monkeypatch.setattr("lolcats_core.training.perplexity.MAX_FLOAT_LOGITS", 3 * 11)
    model = TableModel(table)
    split = perplexity(model, rows, batch_size=4)
    assert [call["rows"] for call in model.calls] == [2, 2, 1]
    assert (split.tokens, split.loss) == (whole.tokens, pytest.approx(whole.loss, rel=1e-6))


def test_max_rows_cuts_and_the_training_mode_comes_back() -> None:
    model, seen = TableModel(torch.zeros(5, 5)).train(), []
    result = perplexity(model, ListRows(input_ids=tokens(9, 4, 5)), batch_size=2, max_rows=3, on_rows=seen.append)
    assert result.tokens == 9
    assert seen == [2, 1]
    assert model.training


@pytest.mark.parametrize("length", [1, 4])
def test_rows_without_a_target_are_refused(length: int) -> None:
    ids = tokens(2, length, 5)
    rows = ListRows(input_ids=ids, loss_mask=torch.zeros_like(ids, dtype=torch.bool))
    with pytest.raises(UserError, match="no token to predict"):
        perplexity(TableModel(torch.zeros(5, 5)), rows, batch_size=1)


def test_bigram_perplexity_equals_a_dense_reference() -> None:
    vocab, train, held_out = 7, tokens(20, 15, 7, seed=1), tokens(4, 15, 7, seed=2)
    counts = np.zeros((vocab, vocab))
    np.add.at(counts, (train[:, :-1].numpy(), train[:, 1:].numpy()), 1)
    unigram = (counts.sum(0) + 1) / (counts.sum() + vocab)
    expected = min(
        -np.log((counts + w * unigram) / (counts.sum(1, keepdims=True) + w))[held_out[:, :-1], held_out[:, 1:]].mean()
        for w in (1, 3, 10, 30, 100, 300, 1000, 3000)
    )
    result = bigram_perplexity(ListRows(input_ids=train), ListRows(input_ids=held_out), vocab)
    assert result.loss == pytest.approx(expected, rel=1e-12)
    assert result.tokens == 4 * 14


def test_a_bigram_learns_a_cycle_and_needs_no_dense_table() -> None:
    vocab = 128_000
    cycle = (torch.arange(400)[None] * 320 + torch.arange(8)[:, None] * 320) % vocab
    result = bigram_perplexity(ListRows(input_ids=cycle.repeat(20, 1)), ListRows(input_ids=cycle), vocab)
    assert result.perplexity < 1.05


def test_bigram_refuses_tokens_outside_the_vocabulary_and_empty_rows() -> None:
    rows = ListRows(input_ids=tokens(3, 5, 9))
    with pytest.raises(UserError, match="outside the vocabulary of 4"):
        bigram_perplexity(rows, rows, 4)
    with pytest.raises(UserError, match="no token to predict"):
        bigram_perplexity(ListRows(input_ids=tokens(0, 5, 9)), rows, 9)

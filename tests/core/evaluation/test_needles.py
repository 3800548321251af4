"""Numbers hidden in text: what an item is, and that it is found exactly when every token of the answer is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lolcats_common.errors import UserError
from lolcats_core.evaluation.needles import NAMES, make_needles, needles_found
from tests.core.tiny import FakeRows, tiny_student, tiny_teacher, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Reader(nn.Module):
    """Knows what comes next wherever the token before is in `seen`, and guesses 0 elsewhere."""

    def __init__(self, missing: int = 0) -> None:
        super().__init__()
        self.weight, self.missing = nn.Parameter(torch.zeros(1)), missing

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        following = torch.cat([input_ids[0, 1:], input_ids.new_zeros(1)])
        following[len(following) - 1 - self.missing :] = 0
        logits = nn.functional.one_hot(following, 400).float()[None]
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_items_are_of_the_length_hide_one_number_and_ask_for_it() -> None:
    rows = FakeRows(12)
    needles = make_needles(rows, TOKENIZER, 200, 6, seed=3)
    assert [needle.ids.shape[0] for needle in needles] == [200] * 6
    for needle in needles:
        text = TOKENIZER.decode(needle.ids)
        answer = TOKENIZER.decode(needle.ids[-needle.answer :]).strip()
        assert len(answer) == 5
        assert answer.isdigit()
        assert text.count(answer) == 2
        name = text.rpartition(" of ")[2].split(" ")[0]
        assert name in NAMES
        assert f"The secret number of {name} is {answer}." in text
        assert text.endswith(f"Answer: The secret number of {name} is {answer}")
    again = make_needles(rows, TOKENIZER, 200, 6, seed=3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(needles, again, strict=True))
    assert not torch.equal(make_needles(rows, TOKENIZER, 200, 6, seed=4)[0].ids, needles[0].ids)
    assert np.ptp([needle.depth for needle in needles]) > 0.2


def test_a_number_is_found_when_every_one_of_its_tokens_is_right() -> None:
    needles = make_needles(FakeRows(12), TOKENIZER, 200, 3, seed=0)
    assert needles_found(Reader(), needles) == [True] * 3
    assert needles_found(Reader(missing=1), needles) == [False] * 3
    assert needles_found(tiny_teacher(vocab_size=400), needles) == [False] * 3
    assert needles_found(tiny_student(vocab_size=400), needles) == [False] * 3


def test_too_short_a_length_or_text_is_refused() -> None:
    for length, rows in ((20, FakeRows(12)), (5000, FakeRows(2))):
        with pytest.raises(UserError, match=f"a needle of {length} tokens needs 1 to"):
            make_needles(rows, TOKENIZER, length, 1, seed=0)

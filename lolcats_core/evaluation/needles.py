"""A number hidden in long real text: whether a model still finds what stands thousands of tokens back.

Each item is validation text with one sentence put into it, then a question about it and the answer. It counts as found
where the most probable token is right at every token of the answer, the ones before given (teacher forcing): what
greedy decoding would write, without decoding. The sentence is none that `select.criterion: retrieval` looks for.

# L tokens of an item, n tokens of its answer
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_core.data.special_tokens import begin_ids
from lolcats_core.model.forward import evaluating, model_device
from lolcats_core.training.loop import Rows

NAMES = ("Berlin", "Nairobi", "Lima", "Oslo", "Kyoto", "Quebec")
NEEDLE = " The secret number of {name} is {number}. "
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
ANSWER = " {number}"


@dataclass(frozen=True)
class Needle:
    """One item: `ids` [L] with its answer at the end, `answer` tokens long. `depth`: where the sentence stands."""

    ids: Tensor
    answer: int
    depth: float


def make_needles(rows: Rows, tokenizer: Any, length: int, count: int, seed: int) -> list[Needle]:
    """`count` items of about `length` tokens in the text of `rows`, the same for the same seed.

    Raises:
        UserError: the rows hold too little text, or `length` no question.
    """
    draw = random.Random(f"{seed}-{length}")
    text = torch.cat([row["input_ids"].flatten() for row in (rows.batch([i]) for i in range(len(rows)))])
    begin = list(begin_ids(tokenizer))

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False).input_ids)

    found = []
    for _ in range(count):
        name, number, depth = draw.choice(NAMES), draw.randrange(10_000, 100_000), draw.random()
        needle, question, answer = (encode(p.format(name=name, number=number)) for p in (NEEDLE, QUESTION, ANSWER))
        space = length - len(begin) - len(needle) - len(question) - len(answer)
        if space < 1 or len(text) < space:
            raise UserError(f"a needle of {length} tokens needs 1 to {len(text)} tokens of text around it, got {space}")
        start = draw.randrange(len(text) - space + 1)
        around = text[start : start + space].tolist()
        place = int(depth * space)
        ids = [*begin, *around[:place], *needle, *around[place:], *question, *answer]
        found.append(Needle(torch.tensor(ids), len(answer), depth))
    return found


def needles_found(model: nn.Module, needles: Sequence[Needle]) -> list[bool]:
    """Whether each is found, one item at a time (lengths differ by a few tokens)."""
    found = []
    with evaluating(model):
        for needle in needles:
            ids = needle.ids[None].to(model_device(model))
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=needle.answer + 1).logits[0, :-1]
            found.append(bool((logits.argmax(-1) == ids[0, -needle.answer :]).all()))
    return found

"""Rows that show which kv groups of a teacher retrieval and text need: needles, random strings twice, and text.

The needles hide in training text, and their templates are not those of the evaluation's tasks. The same seed, rows and
tokenizer give the same probes.

# B rows, L tokens of a row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.data.special_tokens import begin_ids, special_ids
from lolcats_core.training.loop import Rows

SYLLABLES = ("bra", "do", "fel", "gan", "kor", "li", "mun", "ned", "pol", "ri", "sta", "tem", "vas", "wi", "zun")
# What is said once, and how it is asked for at the end; the number follows.
TEMPLATES = (
    ("\nThe access code for {name} is {number}.\n", "\nWhat is the access code for {name}? The access code is"),
    ("\nRemember that the {name} key equals {number}.\n", "\nThe {name} key equals"),
    ("\n{name} was given the number {number} in the register.\n", "\nIn the register, {name} was given the number"),
    ("\nIn {name} live {number} people.\n", "\nHow many people live in {name}? In {name} live"),
)
# Nothing says at its first tokens that a string is repeated.
SKIPPED = 8


@dataclass(frozen=True)
class Probe:
    """Rows `input_ids` [B, L] int64, and `counted` [B, L] bool: the positions whose next-token distribution counts."""

    name: str
    input_ids: Tensor
    counted: Tensor


def make_probes(
    rows: Rows, tokenizer: Any, vocab_size: int, *, count: int, length: int, reach: int, seed: int
) -> tuple[Probe, ...]:
    """The probes ``needle`` (`count` rows), ``copy`` and ``text`` (half as many each, at least one).

    Args:
        rows: training rows; several in a row make one of `length` tokens.
        vocab_size: of the model; a tokenizer may know fewer.
        length: tokens of every row.
        reach: tokens that a cut group still sees; a needle lies further from its question.

    Raises:
        UserError: the length leaves no room for a needle beyond the reach, or there are no rows.
    """
    if not len(rows):
        raise UserError("`select.criterion: retrieval` needs training rows, got none")
    begin = list(begin_ids(tokenizer))
    half = max(1, count // 2)

    def text(rng: np.random.Generator, tokens: int) -> list[int]:
        first, needed = int(rng.integers(len(rows))), -(-tokens // rows.sequence_length)
        ids = rows.batch([(first + i) % len(rows) for i in range(needed)])["input_ids"]
        return [int(i) for i in ids.flatten()[:tokens]]

    def needle(rng: np.random.Generator) -> tuple[list[int], range]:
        fact, question, answer = _needle(rng, lambda said: tokenizer(said, add_special_tokens=False)["input_ids"])
        room = length - len(begin) - len(fact) - len(question) - len(answer)
        # From the needle's last token to the first one of the answer.
        latest = room - max(0, reach - len(question))
        if latest < 1:
            raise UserError(
                f"`select.probe_length` must leave room for a needle further than {reach} tokens from its question,"
                f" got {length}"
            )
        place, filling = int(rng.integers(latest)), text(rng, room)
        ids = [*begin, *filling[:place], *fact, *filling[place:], *question, *answer]
        return ids, range(length - len(answer) - 1, length - 1)

    allowed = np.setdiff1d(np.arange(min(len(tokenizer), vocab_size)), special_ids(tokenizer))

    def copy(rng: np.random.Generator) -> tuple[list[int], range]:
        string = allowed[rng.integers(len(allowed), size=(length - len(begin)) // 2)].tolist()
        ids = [*begin, *string, *string]
        return ids, range(len(begin) + len(string) + SKIPPED, len(ids) - 1)

    def plain(rng: np.random.Generator) -> tuple[list[int], range]:
        return [*begin, *text(rng, length - len(begin))], range(length // 2, length)

    makers = {"needle": (needle, count), "copy": (copy, half), "text": (plain, half)}
    return tuple(
        _probe(name, [make(np.random.default_rng([seed, kind, row])) for row in range(number)])
        for kind, (name, (make, number)) in enumerate(makers.items())
    )


def _needle(rng: np.random.Generator, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a fact, of its question and of the answer, which the question's last token predicts first."""
    said, asked = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    name = "".join(rng.choice(SYLLABLES, size=3)).capitalize()
    number = int(rng.integers(10_000, 100_000))
    question = encode(asked.format(name=name))
    whole = encode(f"{asked.format(name=name)} {number}")
    same = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    return encode(said.format(name=name, number=number)), whole[:same], whole[same:]


def _probe(name: str, made: list[tuple[list[int], range]]) -> Probe:
    ids = torch.tensor([row for row, _ in made])
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (_, places) in enumerate(made):
        counted[row, list(places)] = True
    return Probe(name, ids, counted)

"""RULER's retrieval tasks (arXiv 2404.06654, section 3), for any tokenizer and any text.

Some sentences that matter are hidden in a text, and the question at its end asks for what they say. Where the answer
has several parts, one of them is asked for and those before it are given, so that each item is one continuation and
right or wrong; the mean over items is the share of parts that a model finds, as RULER scores it.

| task | hidden | in |
|---|---|---|
| ruler_single_1 | a number under a name | sentences that repeat |
| ruler_single_2 | the same | text |
| ruler_single_3 | a UUID under a name | text |
| ruler_multikey | numbers under four names, one of which is asked for | text |
| ruler_multivalue | four numbers under one name, all asked for | text |
| ruler_multiquery | numbers under four names, all asked for | text |
| ruler_tracking | a variable, and four that take its value one from another | sentences that repeat |
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"
PARTS = 4
HOPS = 4
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class Item(NamedTuple):
    """A `prompt`, the `lead` with which its answer begins, and the `target` that has to follow."""

    prompt: str
    lead: str
    target: str


# Of random choices, sentences of text, the place of what is asked for in [0, 1], and the text.
Maker = Callable[[np.random.Generator, int, float, str], Item]


def word(rng: np.random.Generator) -> str:
    """A word that no text holds."""
    return "".join(rng.choice(list(CONSONANTS)) + rng.choice(list(VOWELS)) for _ in range(2))


def _different(rng: np.random.Generator, count: int, make: Callable[[np.random.Generator], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _sentences(rng: np.random.Generator, units: int, haystack: str | None) -> list[str]:
    """`units` sentences of the haystack from a random one on, or, without one, those that repeat."""
    if haystack is None:
        return [NOISE[i % len(NOISE)] for i in range(units)]
    found = [sentence for sentence in _SENTENCE.split(haystack) if sentence]
    start = int(rng.integers(len(found)))
    return [found[(start + i) % len(found)] for i in range(units)]


def _hide(
    rng: np.random.Generator, text: list[str], hidden: Sequence[str], depth: float, asked: int | None
) -> tuple[str, int]:
    """The text with the hidden sentences, and which of them is asked for: the one that stands at `depth`.

    Args:
        asked: None where they stand in their order; the others then decide which one is at `depth`.
    """
    here, others = round(depth * len(text)), rng.integers(len(text) + 1, size=len(hidden) - 1)
    if asked is None:
        others = np.sort(others)
        asked = int((others < here).sum())
    places = np.insert(others, asked, here)
    for i in sorted(range(len(hidden)), key=lambda i: (places[i], i), reverse=True):
        text.insert(int(places[i]), hidden[i])
    return " ".join(text), asked


def _numbers(
    keys: int = 1, values: int = 1, queries: int = 1, *, repeating: bool = False, identifiers: bool = False
) -> Maker:
    """Numbers under names. `keys`: names in the text. `values`: of each. `queries`: names that are asked for."""
    kind = "identifier" if identifiers else "number"
    many = "s" if values * queries > 1 else ""

    def value(rng: np.random.Generator) -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4) if identifiers else rng.integers(10**6, 10**7))

    def make(rng: np.random.Generator, units: int, depth: float, haystack: str) -> Item:
        names = _different(rng, keys, lambda rng: f"{word(rng)}-{word(rng)}")
        found = _different(rng, keys * values, value)
        hidden = [f"One of the special magic {kind}s for {names[i // values]} is: {v}." for i, v in enumerate(found)]
        choice = None if values > 1 else int(rng.integers(queries))
        text, asked = _hide(rng, _sentences(rng, units, None if repeating else haystack), hidden, depth, choice)
        subject = f"the special magic {kind}{many} for {_listed(names[:queries])} in the text above"
        question = f"What {'are' if many else 'is'} {subject}{', in the same order' if many else ''}?"
        prompt = f"Some special magic {kind}s are hidden in the text below. Memorize them.\n{text}\n{question}"
        lead = f"{subject.capitalize()} {'are' if many else 'is'}"
        return Item(prompt, lead + "".join(f" {given}," for given in found[:asked]), f" {found[asked]}")

    return make


def _tracking(rng: np.random.Generator, units: int, depth: float, haystack: str) -> Item:
    """A variable with a number, and others that take it over, one from the other."""
    names = _different(rng, HOPS + 1, lambda rng: word(rng).upper())
    number = str(rng.integers(10_000, 100_000))
    hidden = [f"VAR {name} = {f'VAR {names[i - 1]}' if i else number}." for i, name in enumerate(names)]
    text, asked = _hide(rng, _sentences(rng, units, None), hidden, depth, None)
    prompt = (
        f"Follow the chain of variable assignments hidden in the text below.\n{text}\n"
        f"Which variables have the value {number} in the text above?"
    )
    lead = f"In the text above {len(names)} variables have the value {number}:"
    return Item(prompt, lead + "".join(f" {given}," for given in names[:asked]), f" {names[asked]}")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


TASKS: dict[str, Maker] = {
    "ruler_single_1": _numbers(repeating=True),
    "ruler_single_2": _numbers(),
    "ruler_single_3": _numbers(identifiers=True),
    "ruler_multikey": _numbers(keys=PARTS),
    "ruler_multivalue": _numbers(values=PARTS),
    "ruler_multiquery": _numbers(keys=PARTS, queries=PARTS),
    "ruler_tracking": _tracking,
}

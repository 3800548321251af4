"""The project's own multiple-choice task: fair, deterministic items from held-out rows of any kind of text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lolcats_common.errors import UserError
from lolcats_core.evaluation.code_continuation import (
    CONTEXT_CHARACTERS,
    OPTION_CHARACTERS,
    SPAN_WORDS,
    make_items,
    write_task,
)

LENGTH = 1024
NOUNS = [
    "parser",
    "reader",
    "window",
    "buffer",
    "record",
    "branch",
    "header",
    "socket",
    "thread",
    "matrix",
    "vector",
    "kernel",
]
VERBS = [
    "opens",
    "closes",
    "reads",
    "writes",
    "splits",
    "merges",
    "counts",
    "checks",
    "loads",
    "stores",
    "drops",
    "keeps",
]


class TextRows:
    """Rows cut from one text, as concatenated packing makes them."""

    sequence_length = LENGTH

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast, **columns: Tensor) -> None:
        ids = tokenizer(text)["input_ids"]
        count = len(ids) // LENGTH
        self.columns = {"input_ids": torch.tensor(ids[: count * LENGTH]).view(count, LENGTH), **columns}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[list(indices)] for name, column in self.columns.items()}


def code(functions: int) -> str:
    """Different lines of about the same lengths."""
    lines = []
    for n in range(functions):
        noun, verb, other = NOUNS[n % 12], VERBS[n // 12 % 12], NOUNS[(n * 7 + 3) % 12]
        lines += [
            f"def {verb}_{noun}_{n}(self, {other}):",
            f'    """The {noun} {verb} one {other} number {n}."""',
            f"    {noun} = self.{verb}_{other}({n})",
            f"    if {noun} is not {other}[{n * 3}]:",
            f"        raise ValueError({noun!r}, {n * 5})",
            f"    return {noun}.{verb}({other}, {n * 11})",
            "",
        ]
    return "\n".join(lines)


def prose(sentences: int) -> str:
    """One line without an end."""
    return " ".join(
        f"the {NOUNS[n % 12]} {VERBS[n // 12 % 12]} a {NOUNS[n * 5 % 12]} and {VERBS[n * 7 % 12]} it {n} times."
        for n in range(sentences)
    )


def test_items_are_real_text_with_balanced_answers_and_fair_options(tokenizer: PreTrainedTokenizerFast) -> None:
    text = code(120)
    items = make_items(TextRows(text, tokenizer), tokenizer, items=40, seed=3)
    assert Counter(item.gold for item in items) == {0: 10, 1: 10, 2: 10, 3: 10}
    assert len({item.choices[item.gold].strip() for item in items}) == 40
    for item in items:
        assert item.query + item.choices[item.gold] in text
        assert len(item.query) <= CONTEXT_CHARACTERS
        stripped = [choice.strip() for choice in item.choices]
        assert len(set(stripped)) == 4
        assert all(
            choice in text and OPTION_CHARACTERS[0] <= len(choice) <= OPTION_CHARACTERS[1] for choice in stripped
        )
        true = len(stripped[item.gold])
        assert all(abs(len(choice) - true) <= max(6, true // 4) for choice in stripped)
        layout = {choice[: len(choice) - len(choice.lstrip())] for choice in item.choices}
        assert len(layout) == 1


def test_the_same_rows_and_seed_give_the_same_items(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = TextRows(code(120), tokenizer)
    assert make_items(rows, tokenizer, items=30, seed=1) == make_items(rows, tokenizer, items=30, seed=1)
    assert make_items(rows, tokenizer, items=30, seed=1) != make_items(rows, tokenizer, items=30, seed=2)


def test_text_of_long_lines_is_asked_about_in_spans_of_words(tokenizer: PreTrainedTokenizerFast) -> None:
    text = prose(700)
    items = make_items(TextRows(text, tokenizer), tokenizer, items=24)
    for item in items:
        assert item.query + item.choices[item.gold] in text
        assert all(len(choice.split()) == SPAN_WORDS for choice in item.choices)


def test_items_cross_no_document_and_show_no_masked_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = TextRows(code(200), tokenizer)
    half = LENGTH // 2
    positions = torch.arange(half).repeat(len(rows), 2)
    mask = torch.ones(len(rows), LENGTH, dtype=torch.bool)
    mask[:, half + 100 :] = False
    rows.columns |= {"position_ids": positions, "loss_mask": mask}
    ids = rows.columns["input_ids"]
    allowed = [tokenizer.decode(piece.tolist()) for row in ids for piece in (row[:half], row[half : half + 100])]
    for item in make_items(rows, tokenizer, items=20):
        assert any(item.query + item.choices[item.gold] in piece for piece in allowed)
        assert all(any(choice.strip() in piece for piece in allowed) for choice in item.choices)


def test_too_little_text_is_refused_with_the_remedy(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"at least 20 are needed; raise `data.validation_share`"):
        make_items(TextRows(code(8), tokenizer), tokenizer)
    with pytest.raises(UserError, match="only 0 items could be made"):
        make_items(TextRows("x" * 9000, tokenizer), tokenizer)


def test_items_are_written_one_per_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    items = make_items(TextRows(code(120), tokenizer), tokenizer, items=20)
    write_task(items, tmp_path / "items.jsonl", tmp_path / "task")
    lines = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["choices"] for line in lines] == [item.choices for item in items]

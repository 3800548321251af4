"""Synthetic recall on models whose answers are known: a perfect copier, one with a window, and a constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_core.evaluation.harness import run_lm_eval
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.evaluation.synthetic import TASKS, by_cell, make_items, validation_text, write_task
from tests.core.tiny import FakeRows, byte_tokenizer, tiny_tokenizer

LENGTHS = {"copy": (96, 192), "mqar": (96, 192), "needle": (128, 256), "passkey": (480, 640)}


def cells(model: Any, task: str, folder: Path) -> dict[tuple[float, float], float]:
    haystack = "\n".join(f"line {n} says {n * n}" for n in range(40))
    items = make_items(task, byte_tokenizer(), LENGTHS[task], 2, haystack=haystack)
    write_task(task, items, folder / f"{task}.jsonl", folder / task)
    result = run_lm_eval(model, byte_tokenizer(), [task], task_dirs=[folder / task])[task]
    assert (result.metric, result.chance, result.items) == ("acc", 0.0, len(items))
    return {(cell["length"], cell["depth"]): cell["value"] for cell in by_cell(result.samples)}


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_copier_answers_everything_and_a_constant_nothing(
    copier: Any, constant: Any, tmp_path: Path, task: str
) -> None:
    assert set(cells(copier, task, tmp_path).values()) == {1.0}
    assert set(cells(constant, task, tmp_path / "constant").values()) == {0.0}


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_a_window_finds_only_what_is_near(window_only: Any, tmp_path: Path, task: str) -> None:
    found = cells(window_only, task, tmp_path)
    assert all(value == 0.0 for (_, depth), value in found.items() if depth < 0.5)
    assert any(value == 1.0 for (_, depth), value in found.items() if depth == 0.9)


def test_a_window_answers_no_copy_and_no_passkey_from_beyond_it(window_only: Any, tmp_path: Path) -> None:
    for task in ("copy", "passkey"):  # a copy is always as far away as the string is long
        far = {length: value for (length, _), value in cells(window_only, task, tmp_path).items() if length > 96}
        assert far
        assert set(far.values()) == {0.0}, task


def test_copying_falls_where_the_gap_passes_the_window(copier: Any, window_only: Any, constant: Any) -> None:
    measured = {
        name: copy_recall(model, 257, (16, 32, 64, 128), 2, 0, 2)
        for name, model in {"copier": copier, "window": window_only, "constant": constant}.items()
    }
    assert [round(result.value, 1) for result in measured["copier"].values()] == [1.0] * 4
    assert [round(result.value, 1) for result in measured["window"].values()] == [1.0, 1.0, 0.0, 0.0]
    assert all(result.value < 0.1 for result in measured["constant"].values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, tiny_tokenizer])
def test_items_are_the_same_every_time_and_fit_any_tokenizer(task: str, make_tokenizer: Any) -> None:
    tokenizer, lengths = make_tokenizer(), LENGTHS[task]
    items = make_items(task, tokenizer, lengths, 2, seed=5)
    assert items == make_items(task, make_tokenizer(), lengths, 2, seed=5)
    assert items != make_items(task, tokenizer, lengths, 2, seed=6)
    # More of them add items and change none.
    more = make_items(task, tokenizer, lengths[:1], 3, seed=5)
    assert [item for n, item in enumerate(more) if n % 3 < 2] == items[: len(items) // 2]
    for item in items:
        assert len(tokenizer(item.context + item.target)["input_ids"]) <= item.length
        assert item.target.startswith(" ")
        assert not item.context.endswith(" ")


def test_what_does_not_fit_or_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"`evaluate.synthetic_lengths`: 32 tokens leave no room for passkey"):
        make_items("passkey", byte_tokenizer(), (32,), 1)
    with pytest.raises(UserError, match="must be one of copy, mqar, passkey, needle, got 'haystack'"):
        make_items("haystack", byte_tokenizer(), (32,), 1)


def test_the_haystack_is_the_rows_text_without_special_tokens() -> None:
    rows = FakeRows(rows=3, length=20)
    rows.input_ids[0, 3] = 0
    text = validation_text(rows, byte_tokenizer(), 30)
    assert text == byte_tokenizer().decode([i for i in rows.input_ids[:2].flatten().tolist() if i])

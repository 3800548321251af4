"""Synthetic recall on models whose answers are known: a perfect copier, one with a window, and a constant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_core.evaluation import ruler
from lolcats_core.evaluation.harness import run_lm_eval
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.evaluation.synthetic import IN_TEXT, TASKS, by_cell, make_items, validation_text, write_task
from tests.core.tiny import FakeRows, byte_tokenizer, tiny_tokenizer

PLAIN = {"copy": (96, 192), "mqar": (96, 192), "needle": (128, 256), "passkey": (480, 640)}
LENGTHS = {**PLAIN, **dict.fromkeys(ruler.TASKS, (800, 900))}


def cells(model: Any, task: str, folder: Path) -> dict[tuple[float, float], float]:
    haystack = "\n".join(f"line {n} says {n * n}" for n in range(40))
    items = make_items(task, byte_tokenizer(), LENGTHS[task], 2, haystack=haystack)
    write_task(task, items, folder / f"{task}.jsonl", folder / task)
    result = run_lm_eval(model, byte_tokenizer(), [task], task_dirs=[folder / task])[task]
    assert (result.metric, result.chance, result.items) == ("acc", 0.0, len(items))
    return {(cell["length"], cell["depth"]): cell["value"] for cell in by_cell(result.samples)}


@pytest.mark.parametrize("task", PLAIN)
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
    with pytest.raises(UserError, match=r"must be one of copy, mqar, passkey, needle, ruler_.*, got 'haystack'"):
        make_items("haystack", byte_tokenizer(), (32,), 1)


def test_the_haystack_is_the_rows_text_without_special_tokens() -> None:
    rows = FakeRows(rows=3, length=20)
    rows.input_ids[0, 3] = 0
    text = validation_text(rows, byte_tokenizer(), 30)
    assert text == byte_tokenizer().decode([i for i in rows.input_ids[:2].flatten().tolist() if i])


HAYSTACK = " ".join(f"Sentence {n} says something about {n * n}." for n in range(60))
SAYS = {"ruler_tracking": r"VAR {} = "}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_what_ruler_asks_for_stands_once_in_the_text_at_its_depth(task: str) -> None:
    items = make_items(task, byte_tokenizer(), (1200, 1600), 4, haystack=HAYSTACK)
    for item in items:
        text, _, question = item.context.rpartition("\n")
        answer = item.target.strip()
        says = SAYS.get(task, "is: {}.").format(answer)
        assert text.count(says) == 1
        body = text.partition("\n")[2]
        assert abs(body.index(says) / len(body) - item.depth) < 0.2
        assert ("Sentence" in text) == (task in IN_TEXT)
        assert answer not in question
    parts = {"ruler_multivalue": 4, "ruler_multiquery": 4, "ruler_tracking": 5}.get(task, 1)
    given = {item.context.rpartition("\n")[2].count(",") for item in items}
    assert len(given) > 1 or parts == 1, "one part is asked for again and again"


def test_ruler_gives_the_earlier_parts_of_an_answer_in_their_order() -> None:
    for item in make_items("ruler_multivalue", byte_tokenizer(), (1200,), 8, haystack=HAYSTACK):
        numbers = re.findall(r"is: (\d+)\.", item.context)
        given = re.findall(r"\d+", item.context.rpartition("above are")[2])
        assert [*given, item.target.strip()] == numbers[: len(given) + 1]
    for item in make_items("ruler_multiquery", byte_tokenizer(), (1400,), 8, haystack=HAYSTACK):
        said = dict(re.findall(r"for (\S+) is: (\d+)\.", item.context))
        names = re.findall(r"[a-z]{4}-[a-z]{4}", item.context.rpartition("?")[2])
        given = re.findall(r"\d+", item.context.rpartition("above are")[2])
        assert [*given, item.target.strip()] == [said[name] for name in names][: len(given) + 1]
    for item in make_items("ruler_tracking", byte_tokenizer(), (1200,), 8):
        chain = re.findall(r"VAR (\w+) = ", item.context)
        given = re.findall(r"[A-Z]{4}", item.context.rpartition(":")[2])
        assert [*given, item.target.strip()] == chain[: len(given) + 1]


def test_ruler_asks_as_a_chat_where_the_tokenizer_knows_one() -> None:
    tokenizer = byte_tokenizer()
    plain = make_items("ruler_single_2", tokenizer, (900,), 1, haystack=HAYSTACK)[0]
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = make_items("ruler_single_2", tokenizer, (900,), 1, haystack=HAYSTACK)[0]
    assert chat.target == plain.target
    assert chat.context.startswith("<user>Some special magic")
    assert re.search(r"\?<assistant>The special magic number for \S+ in the text above is$", chat.context)


def test_ruler_runs_as_any_other_task_and_a_constant_finds_nothing(constant: Any, tmp_path: Path) -> None:
    items = make_items("ruler_multikey", byte_tokenizer(), (800,), 2, haystack=HAYSTACK)
    write_task("ruler_multikey", items, tmp_path / "items.jsonl", tmp_path / "tasks")
    found = run_lm_eval(constant, byte_tokenizer(), ["ruler_multikey"], task_dirs=[tmp_path / "tasks"])
    assert (found["ruler_multikey"].value, found["ruler_multikey"].items) == (0.0, 6)

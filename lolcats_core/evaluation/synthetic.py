"""Recall over text, for any tokenizer: copying, associative recall (MQAR), passkey, needle and RULER as lm-eval tasks.

An item is a context and the one right continuation; it counts when the model's greedy answer is that continuation. The
same seed, tokenizer and lengths give the same items. RULER's questions are put through the tokenizer's chat template
where it has one. Sources: MQAR, arXiv 2312.04927; passkey, arXiv 2305.16300, 4.2; RULER, arXiv 2404.06654.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lolcats_common.errors import UserError
from lolcats_common.files import write_text
from lolcats_common.records import Cell
from lolcats_core.evaluation import ruler
from lolcats_core.evaluation.recall import mean_and_stderr
from lolcats_core.evaluation.ruler import word
from lolcats_core.training.loop import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_FILES = Path(__file__).parent / "lm_eval_tasks"
DEPTHS = (0.1, 0.5, 0.9)
# The copy begins with words that say where it is; none of them is asked for.
COPY_LEAD = 4
GARBAGE = "".join(f"{sentence} " for sentence in ruler.NOISE)
PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)


@dataclass(frozen=True)
class SyntheticItem:
    """`context` ends where the model has to go on with `target`.

    Attributes:
        length: tokens that were asked for; the context has at most as many and the target is among them.
        depth: where in the context the answer stands, from 0 (its start) to 1 (just before the question).
    """

    context: str
    target: str
    length: int
    depth: float


Maker = Callable[[np.random.Generator, int, float, str], tuple[str, str]]


def make_items(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    per_cell: int,
    *,
    seed: int = 0,
    haystack: str = GARBAGE,
) -> list[SyntheticItem]:
    """`per_cell` items of each length and depth, as long as the length allows.

    Args:
        task: of `TASKS`.
        lengths: tokens of context and target together.
        haystack: text in which the tasks of `IN_TEXT` hide what they ask for; repeated where it is short.

    Raises:
        UserError: the task is unknown, or a length leaves no room for it.
    """
    if task not in TASKS:
        raise UserError(f"a synthetic task must be one of {', '.join(TASKS)}, got {task!r}")
    maker = _PLAIN[task] if task in _PLAIN else _asked(ruler.TASKS[task], tokenizer)
    items = []
    for length in lengths:
        for depth in DEPTHS:
            for number in range(per_cell):
                key = [seed, TASKS.index(task), length, round(1000 * depth), number]
                context, target = _longest(maker, key, depth, haystack, tokenizer, length, task)
                items.append(SyntheticItem(context, target, length, depth))
    return items


def write_task(task: str, items: Sequence[SyntheticItem], items_file: Path, task_dir: Path) -> None:
    """Write the items as JSONL and, in `task_dir`, an lm-eval task of that name which reads them."""
    lines = (json.dumps(asdict(item), ensure_ascii=False, sort_keys=True) for item in items)
    write_text(items_file, "\n".join(lines) + "\n")
    definition = {
        "include": str(TASK_FILES / f"{task}.yaml"),
        "task": task,
        "dataset_kwargs": {
            "data_files": {"test": str(items_file.resolve())},
            "cache_dir": str((task_dir / "cache").resolve()),
        },
    }
    write_text(task_dir / f"{task}.yaml", yaml.safe_dump(definition))


def by_cell(samples: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The mean score of each (``length``, ``depth``), in order."""
    cells: dict[tuple[int, float], list[float]] = {}
    for sample in samples:
        cells.setdefault((sample["length"], sample["depth"]), []).append(sample["score"])
    found: list[Cell] = []
    for (length, depth), scores in sorted(cells.items()):
        value, stderr = mean_and_stderr(scores)
        found.append({"length": length, "depth": depth, "value": value, "stderr": stderr})
    return found


def validation_text(rows: Rows, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Text of the first rows, at least `tokens` tokens where there are so many; a haystack."""
    count = min(len(rows), -(-tokens // int(rows.sequence_length)))
    ids = rows.batch(range(count))["input_ids"].flatten().tolist()
    special = set(tokenizer.all_special_ids)
    return str(tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False))


def _longest(
    maker: Maker,
    key: list[int],
    depth: float,
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    task: str,
) -> tuple[str, str]:
    """The item with the most units of filling that fits; the same random choices at every size."""

    def build(units: int) -> tuple[str, str]:
        return maker(np.random.default_rng(key), units, depth, haystack)

    def fits(units: int) -> bool:
        return len(tokenizer("".join(build(units)))["input_ids"]) <= length

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        raise UserError(f"`evaluate.synthetic_lengths`: {length} tokens leave no room for {task}; give more")
    return build(low)


def _asked(maker: ruler.Maker, tokenizer: PreTrainedTokenizerBase) -> Maker:
    """Items of RULER as a context: the question and the lead of its answer, as a chat where the tokenizer knows one."""

    def make(rng: np.random.Generator, units: int, depth: float, haystack: str) -> tuple[str, str]:
        item = maker(rng, units, depth, haystack)
        if tokenizer.chat_template is None:
            return f"{item.prompt} {item.lead}", item.target
        turn = [{"role": "user", "content": item.prompt}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return f"{chat}{item.lead}", item.target

    return make


def _copy(rng: np.random.Generator, units: int, depth: float, _: str) -> tuple[str, str]:
    """Random words twice; the copy stops at `depth`, and the next word is asked for."""
    words = [word(rng) for _ in range(units + COPY_LEAD + 1)]
    place = min(len(words) - 1, max(COPY_LEAD, round(depth * len(words))))
    return " ".join(words) + "\n" + " ".join(words[:place]), " " + words[place]


def _mqar(rng: np.random.Generator, units: int, depth: float, _: str) -> tuple[str, str]:
    """Pairs of a key and a number, one to a line, and one key again at the end."""
    keys: list[str] = []
    while len(keys) < units + 1:
        key = word(rng)
        if key not in keys:
            keys.append(key)
    numbers = rng.integers(10, 100, size=len(keys))
    asked = min(len(keys) - 1, int(depth * len(keys)))
    pairs = "".join(f"{key}: {number}\n" for key, number in zip(keys, numbers, strict=True))
    return f"{pairs}{keys[asked]}:", f" {numbers[asked]}"


def _passkey(rng: np.random.Generator, units: int, depth: float, _: str) -> tuple[str, str]:
    """The published prompt: a number of five digits inside sentences that repeat."""
    number, before = rng.integers(10_000, 100_000), round(depth * units)
    hidden = f"The pass key is {number}. Remember it. {number} is the pass key.\n"
    filling = GARBAGE * before + hidden + GARBAGE * (units - before)
    return f"{PASSKEY_TASK}{filling}\nWhat is the pass key? The pass key is", f" {number}"


def _needle(rng: np.random.Generator, units: int, depth: float, haystack: str) -> tuple[str, str]:
    """One assignment between lines of the haystack, asked for at the end."""
    lines = haystack.split("\n")
    start = int(rng.integers(len(lines)))
    chosen = [lines[(start + i) % len(lines)] for i in range(units)]
    name, number = f"{word(rng)}_{word(rng)}", rng.integers(10_000, 100_000)
    chosen.insert(round(depth * units), f"{name} = {number}")
    return "\n".join(chosen) + f"\n{name} =", f" {number}"


_PLAIN: dict[str, Maker] = {"copy": _copy, "mqar": _mqar, "passkey": _passkey, "needle": _needle}
TASKS = (*_PLAIN, *ruler.TASKS)
# Tasks that hide something in text.
IN_TEXT = {"needle", *ruler.TASKS} - {"ruler_single_1", "ruler_tracking"}

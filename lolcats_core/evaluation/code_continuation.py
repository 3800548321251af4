"""The task `code_continuation`: four-way multiple choice over the next line of held-out text.

Items are cut from validation rows alone, so they work for any data set that the pipeline has prepared and never show
training text. The three wrong options are real lines of the same row (or of another validation row), of similar
length and with the true line's indentation, so that neither length nor layout gives the answer away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from lolcats_common.errors import UserError
from lolcats_common.files import write_text
from lolcats_core.training.loop import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "code_continuation"
ITEMS = 100
MIN_ITEMS = 20
CHOICES = 4
CONTEXT_CHARACTERS = 700
MIN_CONTEXT_CHARACTERS = 160
OPTION_CHARACTERS = (16, 90)
SPAN_WORDS = 10
ITEMS_PER_ROW = 4
TASK_FILE = Path(__file__).parent / "lm_eval_tasks" / f"{NAME}.yaml"


@dataclass(frozen=True)
class Item:
    """One question. `query` + `choices[gold]` is a piece of the text of validation row `row`."""

    query: str
    choices: list[str]
    gold: int
    row: int


@dataclass(frozen=True)
class _Candidate:
    """A place to ask at: what comes before, the layout put before each option, the option, its place in the text."""

    query: str
    lead: str
    text: str
    place: int


def make_items(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, items: int = ITEMS, seed: int = 0) -> list[Item]:
    """Cut multiple-choice items from validation rows; the same rows, tokenizer and seed give the same items.

    Rows are taken in a seeded order, one item from each before a second from any. Text of long lines (prose) is asked
    about in spans of words.

    Args:
        rows: validation rows; text is never joined across rows, special tokens or masked targets.
        items: how many to make at most.

    Raises:
        UserError: fewer than `MIN_ITEMS` (or `items`, if that is less) can be made.
    """
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    sources = _Sources(rows, tokenizer, seed)
    made: list[Item] = []
    used: set[str] = set()
    for turn in range(ITEMS_PER_ROW):
        for row in order:
            if len(made) == items:
                break
            item = sources.item(int(row), turn, used)
            if item is not None:
                made.append(item)
    if len(made) < min(items, MIN_ITEMS):
        raise UserError(
            f"{NAME}: only {len(made)} items could be made from {len(rows)} validation rows and at least "
            f"{min(items, MIN_ITEMS)} are needed; raise `data.validation_share` or leave it out of `evaluate.tasks`"
        )
    return _balanced(made, seed)


def write_task(items: Sequence[Item], items_file: Path, task_dir: Path) -> None:
    """Write the items as JSONL and, in `task_dir`, an lm-eval task that reads them.

    Data sets that lm-eval makes of them are kept under `task_dir` and not in the user's home.
    """
    lines = (json.dumps(asdict(item), ensure_ascii=False, sort_keys=True) for item in items)
    write_text(items_file, "\n".join(lines) + "\n")
    task = {
        "include": str(TASK_FILE),
        "task": NAME,
        "dataset_kwargs": {
            "data_files": {"test": str(items_file.resolve())},
            "cache_dir": str((task_dir / "cache").resolve()),
        },
    }
    write_text(task_dir / f"{NAME}.yaml", yaml.safe_dump(task))


class _Sources:
    """Decoded text of rows and the candidates in it."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.rows, self.tokenizer, self.seed = rows, tokenizer, seed
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.cache: dict[int, list[list[_Candidate]]] = {}

    def item(self, row: int, turn: int, used: set[str]) -> Item | None:
        """An item whose true line is not in `used` (it is then added), or None."""
        rng = np.random.default_rng([self.seed, row, turn])
        for pieces in self.candidates(row):
            for index in rng.permutation(len(pieces)):
                true = pieces[index]
                if len(true.query) < MIN_CONTEXT_CHARACTERS or true.text in used:
                    continue
                wrong = self.wrong_options(true, row, rng)
                if len(wrong) == CHOICES - 1:
                    used.add(true.text)
                    return Item(true.query, [true.lead + text for text in (true.text, *wrong)], 0, row)
        return None

    def wrong_options(self, true: _Candidate, row: int, rng: np.random.Generator) -> list[str]:
        """Up to three other texts of similar length, from this row first, that neither repeat nor occur before."""
        wrong: list[str] = []
        others = (int(other) for other in rng.permutation(len(self.rows))[:16] if int(other) != row)
        for source in (row, *others):
            for pieces in self.candidates(source):
                for index in rng.permutation(len(pieces)):
                    other = pieces[index]
                    near = abs(len(other.text) - len(true.text)) <= max(6, len(true.text) // 4)
                    apart = source != row or abs(other.place - true.place) >= len(true.text)
                    if near and apart and other.text not in (true.text, *wrong) and other.text not in true.query:
                        wrong.append(other.text)
                    if len(wrong) == CHOICES - 1:
                        return wrong
        return wrong

    def candidates(self, row: int) -> list[list[_Candidate]]:
        """Candidates of a row by piece of continuous text; by lines, or by spans of words where lines are too long."""
        if row not in self.cache:
            if len(self.cache) >= 256:
                self.cache.clear()
            pieces = list(self.pieces(row))
            by_line = [list(_lines(text)) for text in pieces]
            enough = sum(map(len, by_line)) >= CHOICES
            self.cache[row] = by_line if enough else [list(_spans(text)) for text in pieces]
        return self.cache[row]

    def pieces(self, row: int) -> Iterator[str]:
        """Continuous text of a row: cut at special tokens, at starts of documents and where targets are masked."""
        batch = {name: values[0].numpy() for name, values in self.rows.batch([row]).items()}
        ids = batch["input_ids"]
        keep = ~np.isin(ids, self.special)
        if "loss_mask" in batch:
            keep &= batch["loss_mask"].astype(bool)
        starts = np.flatnonzero(np.diff(keep, prepend=False) & keep)
        if "position_ids" in batch:
            starts = np.union1d(starts, np.flatnonzero((batch["position_ids"] == 0) & keep))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            chosen = ids[start:end][keep[start:end]]
            yield str(self.tokenizer.decode(chosen.tolist(), clean_up_tokenization_spaces=False))


def _usable(text: str) -> bool:
    low, high = OPTION_CHARACTERS
    return low <= len(text) <= high and "\ufffd" not in text and re.search(r"[^\W\d_]{3}", text) is not None


def _lines(text: str) -> Iterator[_Candidate]:
    """Whole lines of a piece of text; its first and last line may be cut and are left out."""
    lines = text.split("\n")
    place = len(lines[0]) + 1
    for line in lines[1:-1]:
        content = line.strip()
        before = text[len(lines[0]) + 1 : place].rstrip()
        if _usable(content) and "\ufffd" not in before:
            blank = text[len(lines[0]) + 1 + len(before) : place]
            indent = line[: len(line) - len(line.lstrip())]
            yield _Candidate(_tail(before, "\n"), blank + indent, content, place)
        place += len(line) + 1


def _spans(text: str) -> Iterator[_Candidate]:
    """Spans of `SPAN_WORDS` words, each starting where the one before ends; cut words at the edges are left out."""
    words = list(re.finditer(r"\S+", text))[1:-1]
    for first in range(0, len(words) - SPAN_WORDS + 1, SPAN_WORDS):
        span = words[first : first + SPAN_WORDS]
        content = " ".join(word.group() for word in span)
        before = text[words[0].start() : span[0].start()].rstrip()
        if _usable(content) and "\ufffd" not in before:
            yield _Candidate(_tail(before, " "), " ", content, span[0].start())


def _tail(text: str, boundary: str) -> str:
    """The last `CONTEXT_CHARACTERS` of the context, from the next `boundary` on."""
    if len(text) <= CONTEXT_CHARACTERS:
        return text
    cut = text[-CONTEXT_CHARACTERS:]
    return cut[cut.find(boundary) + 1 :]


def _balanced(items: list[Item], seed: int) -> list[Item]:
    """Move each true option so that every position is right equally often (to within one item)."""
    rng = np.random.default_rng([seed, len(items), CHOICES])
    golds = rng.permutation(np.arange(len(items)) % CHOICES)
    moved = []
    for item, gold in zip(items, golds.tolist(), strict=True):
        choices = item.choices[1:]
        choices.insert(gold, item.choices[0])
        moved.append(Item(item.query, choices, gold, item.row))
    return moved

"""From a record's fields to documents of text, and from those to token ids with a note on where the loss is taken.

Three shapes: `text`; Alpaca (`instruction`, `input`, `output`) in its published prompt; conversations through the
tokenizer's own template (`conversations.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats_common.errors import UserError
from lolcats_core.data import conversations
from lolcats_core.data.segments import RecordError, Segment

Shape = Literal["text", "alpaca", "messages"]
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def detect_shape(fields: Mapping[str, Any], wanted: str) -> Shape:
    """The record's shape: `wanted`, or for ``auto`` what its columns say.

    Raises:
        RecordError: no known shape has these columns.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    # A table of records of several shapes has every column in each, with nothing in those of the others.
    said = {name for name, value in fields.items() if value is not None}
    for names in (said, set(fields)):
        if names & {"messages", "conversations"}:
            return "messages"
        if {"instruction", "output"} <= names:
            return "alpaca"
        if "text" in names:
            return "text"
    columns = ", ".join(sorted(map(str, fields))) or "none"
    raise RecordError(f"columns must be text, or instruction and output, or messages or conversations, got {columns}")


def read_record(fields: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The fields that a record of `shape` is made of, conversations in one form; a schema checks them next.

    Raises:
        RecordError: the record says something that would not be learnt.
    """
    if shape == "messages":
        return conversations.read_conversation(fields)
    if shape == "text":
        return {name: fields[name] for name in ("text",) if name in fields}
    for name in ("system", "history"):
        if fields.get(name):
            raise RecordError(f"Alpaca's prompt has no place for `{name}`: give such records as `messages`")
    return {name: fields[name] for name in ("instruction", "input", "output") if name in fields}


def check_template(tokenizer: PreTrainedTokenizerBase, shape: str) -> None:
    """Refuse chat records where the tokenizer cannot lay them out.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if shape == "messages" and not tokenizer.chat_template:
        raise UserError("`data.format`: chat messages need a chat template, and the teacher's tokenizer has none")


def identity_of(record: Mapping[str, Any], shape: Shape) -> str:
    """The text by which a record (of `read_record`) is told from others, whatever tokenizer and template it goes to."""
    if shape == "messages":
        return conversations.identity(record)
    return record["text"] if shape == "text" else "\0".join([_alpaca_prompt(record), record["output"]])


def documents_of(
    record: Mapping[str, Any], shape: Shape, completion_only: bool, tokenizer: PreTrainedTokenizerBase
) -> list[list[Segment]]:
    """The texts of a record in order; one record becomes one document (conversations: see `conversations`).

    Args:
        record: of `read_record`.
        completion_only: take the loss on responses alone (Alpaca's output, the assistant's turns).

    Raises:
        RecordError: the chat template refuses the conversation, or there is no response to learn.
    """
    if shape == "text":
        if completion_only:
            raise RecordError("plain text has no response to take the loss on: set `data.loss_on: all`")
        return [[Segment(record["text"], True)]]
    if shape == "alpaca":
        return [[Segment(_alpaca_prompt(record), not completion_only), Segment(record["output"], True)]]
    check_template(tokenizer, shape)
    return conversations.documents_of(record, completion_only, tokenizer)


def _alpaca_prompt(record: Mapping[str, Any]) -> str:
    context = record.get("input") or ""
    prompt = PROMPT_WITH_INPUT if context.strip() else PROMPT
    return prompt.format(instruction=record["instruction"], input=context)


class Encoder:
    """Documents to token ids: a leading BOS where the tokenizer adds one, EOS at the end of every document.

    A document is tokenized as a whole, since pieces of it would have other tokens (and with a sentencepiece tokenizer
    spaces that are not in the text); its segments say through the tokens' places which of them are targets. Text that
    spells a special token ("<eos>" in a source file) stays text; only a chat template's segments hold such.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the teacher's tokenizer has no eos token, which marks where a document ends")
        self.tokenizer, self.eos = tokenizer, int(tokenizer.eos_token_id)
        added = tokenizer("", add_special_tokens=True).input_ids
        self.lead = [tokenizer.bos_token_id] if tokenizer.bos_token_id in added[:1] else []

    def encode(self, documents: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and target marks of each document, whose segments are all special or none is.

        Raises:
            UserError: targets begin inside a document, and the tokenizer does not say where its tokens stand.
        """
        encoded: dict[int, tuple[list[int], list[bool]]] = {}
        for special in (False, True):
            chosen = [index for index, document in enumerate(documents) if document[0].special == special]
            parts = self._encode([documents[index] for index in chosen], special) if chosen else []
            encoded |= dict(zip(chosen, parts, strict=True))
        return [encoded[index] for index in range(len(documents))]

    def _encode(self, documents: list[list[Segment]], special: bool) -> list[tuple[list[int], list[bool]]]:
        texts = ["".join(segment.text for segment in document) for document in documents]
        mixed = any(segment.target != document[0].target for document in documents for segment in document)
        if mixed and not self.tokenizer.is_fast:
            raise UserError(
                "`data.loss_on: completion` needs a tokenizer.json, which says where in a text its tokens stand; the"
                " teacher's tokenizer has none"
            )
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not special,
            return_offsets_mapping=mixed,
            verbose=False,
        )
        encoded = []
        for index, (document, text, ids) in enumerate(zip(documents, texts, found.input_ids, strict=True)):
            lead = [] if special else self.lead
            marks = _marks(document, text, found["offset_mapping"][index]) if mixed else [document[0].target] * len(ids)
            # ChatML's template writes the end token and a line's end behind it: the document ends there already.
            ended = ids[-1:] == [self.eos] or (special and text.rstrip().endswith(str(self.tokenizer.eos_token)))
            end = [] if ended else [self.eos]
            tokens, targets = [*lead, *ids, *end], [document[0].target] * len(lead) + marks
            encoded.append((tokens, targets + [document[-1].target] * len(end)))
        return encoded


def _marks(document: list[Segment], text: str, places: list[tuple[int, int]]) -> list[bool]:
    """Whether each token, which stands at characters [start, stop) of `text`, is a target.

    One that reaches into a target from outside is, if it holds more of it than white space.
    """
    targets = np.repeat([segment.target for segment in document], [len(segment.text) for segment in document])
    inked = targets & ~np.fromiter(map(str.isspace, text), bool, len(text))
    starts, stops = np.asarray(places, dtype=np.int64).reshape(-1, 2).T
    # A token of white space may have no place but the one behind it.
    starts = np.where(starts == stops, np.maximum(starts - 1, 0), starts)
    stops = np.maximum(stops, starts + 1)
    before, inked_before = (np.concatenate([[0], np.cumsum(marked)]) for marked in (targets, inked))
    whole = before[stops] - before[starts] == stops - starts
    return [bool(mark) for mark in whole | (inked_before[stops] > inked_before[starts])]

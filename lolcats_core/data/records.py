"""From a record's fields to segments of text, with a note on which of them the loss is taken.

Three shapes: `text`; Alpaca (`instruction`, `input`, `output`) in its published prompt; chat `messages` through the
tokenizer's own template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lolcats_common.errors import UserError

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


class RecordError(ValueError):
    """A record cannot be used; the message is the reason that is written to rejected.jsonl."""


@dataclass(frozen=True)
class Segment:
    """A part of a document's text.

    Attributes:
        target: the loss is taken on its tokens. special: it came from a template, so it may spell special tokens.
    """

    text: str
    target: bool
    special: bool = False


def detect_shape(fields: Mapping[str, Any], wanted: str) -> Shape:
    """The record's shape: `wanted`, or for ``auto`` what its columns say.

    Raises:
        RecordError: no known shape has these columns.
    """
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if "messages" in fields:
        return "messages"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "text" in fields:
        return "text"
    columns = ", ".join(sorted(map(str, fields))) or "none"
    raise RecordError(f"columns must be text, or instruction and output, or messages, got {columns}")


def check_template(tokenizer: PreTrainedTokenizerBase, shape: str) -> None:
    """Refuse chat records where the tokenizer cannot lay them out.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if shape == "messages" and not tokenizer.chat_template:
        raise UserError("`data.format`: chat messages need a chat template, and the teacher's tokenizer has none")


def segments_of(
    fields: Mapping[str, Any], shape: Shape, completion_only: bool, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """The record's text in order; one record becomes one document.

    Args:
        completion_only: take the loss on responses alone (Alpaca's output, the assistant's turns).

    Raises:
        RecordError: the chat template refuses the conversation, or there is no response to learn.
    """
    if shape == "text":
        if completion_only:
            raise RecordError("plain text has no response to take the loss on: set `data.loss_on: all`")
        return [Segment(fields["text"], True)]
    if shape == "alpaca":
        context = fields.get("input") or ""
        prompt = (PROMPT_WITH_INPUT if context.strip() else PROMPT).format(
            instruction=fields["instruction"], input=context
        )
        return [Segment(prompt, not completion_only), Segment(fields["output"], True)]
    check_template(tokenizer, shape)
    return _chat_segments(fields["messages"], completion_only, tokenizer)


def _chat_segments(
    messages: list[dict[str, Any]], completion_only: bool, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    def render(count: int, prompt: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))
        except Exception as error:
            raise RecordError(f"the chat template refuses the conversation: {error}") from None

    whole = render(len(messages))
    if not completion_only:
        return [Segment(whole, True, special=True)]
    segments, done = list[Segment](), ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not (before.startswith(done) and after.startswith(before)):
            raise RecordError("the chat template rewrites earlier turns, so responses cannot be told apart")
        segments += [
            Segment(before[len(done) :], False, special=True),
            Segment(after[len(before) :], True, special=True),
        ]
        done = after
    if not segments:
        raise RecordError("no message of the assistant, so nothing to learn with `data.loss_on: completion`")
    if not whole.startswith(done):
        raise RecordError("the chat template rewrites earlier turns, so responses cannot be told apart")
    return [segment for segment in [*segments, Segment(whole[len(done) :], False, special=True)] if segment.text]


class Encoder:
    """Segments to token ids: a leading BOS where the tokenizer adds one, EOS at the end of every document.

    Text that spells a special token ("<eos>" in a source file) stays text; only a chat template's segments hold such.

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
        """Token ids and target marks of each document; the texts go through the tokenizer together."""
        plain = self._ids([segment.text for document in documents for segment in document if not segment.special], True)
        special = self._ids([segment.text for document in documents for segment in document if segment.special], False)
        encoded = []
        for document in documents:
            tokens: list[int] = [] if document[0].special else list(self.lead)
            targets = [document[0].target] * len(tokens)
            for segment in document:
                part = next(special if segment.special else plain)
                tokens += part
                targets += [segment.target] * len(part)
            if not tokens or tokens[-1] != self.eos:
                tokens.append(self.eos)
                targets.append(document[-1].target)
            encoded.append((tokens, targets))
        return encoded

    def _ids(self, texts: list[str], as_text: bool) -> Iterator[list[int]]:
        if not texts:
            return iter(())
        return iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text, verbose=False).input_ids
        )

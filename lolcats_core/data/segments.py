"""What a record becomes before it is tokens: segments of text, with a note on which of them the loss is taken."""

from __future__ import annotations

from dataclasses import dataclass


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

"""Tokens of a tokenizer that are no text, and what it puts before every text."""

from __future__ import annotations

from typing import Any


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that random strings must not hold: the special and the added ones."""
    return tuple(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}))


def begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """The beginning-of-sequence token, for tokenizers that put one before every text."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()

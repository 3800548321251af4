"""Pandera schemas: raw records by shape, and packed token rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa

from lolcats_core.data.conversations import ROLES


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _has_content(value: Any) -> bool:
    return not isinstance(value, str) or bool(value.strip())


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and m.get("role") in ROLES and _says_something(m) for m in value)
        and any(m.get("content", "").strip() or "tool_calls" in m for m in value)
    )


def _says_something(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), str) or ("content" not in message and "tool_calls" in message)


def _text() -> pa.Column:
    return _column((_is_text, "is not text"), (_has_content, "is empty"))


def _optional_text() -> pa.Column:
    return _column((_is_optional_text, "is not text"))


def _conversation() -> pa.Column:
    shape = f"is not a list of messages with a role of {', '.join(ROLES)} and text content or tool_calls"
    return _column((_is_conversation, shape))


def _column(*checks: tuple[Callable[[Any], bool], str]) -> pa.Column:
    # pandas counts None and NaN as absent and would not show them to a check: ignore_na=False.
    return pa.Column(
        object,
        [pa.Check(check, element_wise=True, ignore_na=False, error=error) for check, error in checks],
        nullable=True,
    )


RAW_SCHEMAS = {
    "text": pa.DataFrameSchema({"text": _text()}),
    "alpaca": pa.DataFrameSchema({"instruction": _text(), "input": _optional_text(), "output": _text()}),
    "messages": pa.DataFrameSchema({"messages": _conversation()}),
}


def rejected_records(records: Sequence[Mapping[str, Any]], shape: str, limit: int) -> dict[int, str]:
    """Reasons of the records that do not satisfy their shape's schema, by index.

    Args:
        records: of `lolcats_core.data.records.read_record`.
        limit: most bytes of UTF-8 that a record's text may have.
    """
    schema = RAW_SCHEMAS[shape]
    names = list(schema.columns)
    reasons: dict[int, str] = {}
    # JSON can write a lone surrogate; UTF-8, the tokenizer and pandas cannot, so these never reach the schema.
    for index, record in enumerate(records):
        bad = [name for name, value in record.items() if not _is_unicode(value)]
        if bad:
            reasons[index] = f"`{bad[0]}` is not valid Unicode (a lone surrogate)"
    held = [{} if index in reasons else record for index, record in enumerate(records)]
    # dtype object keeps what was given: pandas would turn None and numbers among strings into something else.
    columns = {name: pd.Series([record.get(name) for record in held], dtype=object) for name in names}
    try:
        schema.validate(pd.DataFrame(columns), lazy=True)
    except pa.errors.SchemaErrors as error:
        for case in error.failure_cases.to_dict("records"):
            reasons.setdefault(int(case["index"]), f"`{case['column']}` {case['check']}")
    for index, record in enumerate(records):
        missing = [name for name in names if name not in record and name != "input"]
        if missing:
            reasons[index] = f"`{missing[0]}` is missing"
        elif index not in reasons and (size := sum(len(text.encode()) for text in texts_in(record))) > limit:
            reasons[index] = f"{size} bytes, above `data.max_record_bytes` {limit}"
    return reasons


def texts_in(value: Any) -> Iterator[str]:
    """Every text inside lists and the values of objects, however deep, in no particular order."""
    held = [value]
    while held:
        one = held.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            held += one.values()
        elif isinstance(one, list):
            held += one


def _is_unicode(value: Any) -> bool:
    try:
        return all(text.encode() is not None for text in texts_in(value))
    except UnicodeEncodeError:
        return False


def check_rows(row: Mapping[str, np.ndarray], vocab_size: int, length: int, below: int | None = None) -> None:
    """Check one batch of packed rows.

    Args:
        row: columns [n, L] of a `TokenRows` batch.
        below: where rows may begin anywhere, what all positions lie below; None: rows begin at 0.

    Raises:
        pandera.errors.SchemaError: ids outside the vocabulary, positions that neither go on nor start again, or a
            mask that is not boolean.
    """
    ids = row["input_ids"]
    frame = {"input_ids": ids.reshape(-1), "column": np.tile(np.arange(length), len(ids))}
    columns = {
        "input_ids": pa.Column(np.int64, pa.Check.in_range(0, vocab_size - 1)),
        "column": pa.Column(np.int64, pa.Check.in_range(0, length - 1)),
    }
    if "position_ids" in row:
        positions = row["position_ids"]
        first = positions[:, :1] if below else np.zeros_like(positions[:, :1])
        steps = np.diff(positions, axis=1, prepend=first - 1)
        frame["position_ids"] = positions.reshape(-1)
        frame["starts_or_goes_on"] = ((positions == first) | (steps == 1)).reshape(-1)
        columns["position_ids"] = pa.Column(np.int64, pa.Check.in_range(0, (below or length) - 1))
        columns["starts_or_goes_on"] = pa.Column(bool, pa.Check.eq(True))
    if "loss_mask" in row:
        frame["loss_mask"] = row["loss_mask"].reshape(-1)
        columns["loss_mask"] = pa.Column(bool)
    pa.DataFrameSchema(columns, strict=True).validate(pd.DataFrame(frame))

"""Records become documents with the loss where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lolcats_common.errors import UserError
from lolcats_core.data.records import Encoder, detect_shape, documents_of
from lolcats_core.data.segments import RecordError, Segment
from tests.core.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "all right"},
]


def split(fields: dict[str, Any], shape: Any, completion: bool) -> tuple[str, str]:
    """Decoded targets and decoded rest."""
    tokens, targets = Encoder(TOKENIZER).encode(documents_of(fields, shape, completion, TOKENIZER))[0]
    chosen = [t for t, target in zip(tokens, targets, strict=True) if target]
    rest = [t for t, target in zip(tokens, targets, strict=True) if not target]
    return TOKENIZER.decode(chosen), TOKENIZER.decode(rest)


def test_alpaca_scores_the_response_alone() -> None:
    fields = {"instruction": "add", "input": "1 2", "output": "3"}
    targets, prompt = split(fields, "alpaca", True)
    assert targets == "3<eos>"
    assert "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n" in prompt
    targets, rest = split(fields, "alpaca", False)
    assert targets.endswith("### Response:\n3<eos>")
    assert rest == ""


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_alpaca_without_input_has_the_short_prompt(empty: str | None) -> None:
    _, prompt = split({"instruction": "add", "input": empty, "output": "3"}, "alpaca", True)
    assert "### Input" not in prompt
    assert "further context" not in prompt


def test_chat_scores_every_turn_of_the_assistant_alone() -> None:
    targets, rest = split({"messages": CHAT}, "messages", True)
    assert targets == "hi<|end|>all right<|end|>" + ("<eos>")
    assert rest == "<|system|>be kind<|end|><|user|>hello<|end|><|assistant|><|user|>more<|end|><|assistant|>"


def test_chat_without_masks_is_the_template_s_text() -> None:
    targets, rest = split({"messages": CHAT}, "messages", False)
    assert targets == TOKENIZER.apply_chat_template(CHAT, tokenize=False) + "<eos>"
    assert rest == ""


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4))
def test_encoding_loses_nothing(texts: list[str]) -> None:
    document = [Segment(text, i % 2 == 0) for i, text in enumerate(texts)]
    tokens, targets = Encoder(TOKENIZER).encode([document])[0]
    assert TOKENIZER.decode(tokens[:-1]) == "".join(texts)
    assert tokens[-1] == TOKENIZER.eos_token_id
    assert len(tokens) == len(targets)


def test_text_that_spells_a_special_token_stays_text() -> None:
    tokens, _ = Encoder(TOKENIZER).encode([[Segment("a<eos>b", True)]])[0]
    assert TOKENIZER.eos_token_id not in tokens[:-1]
    assert TOKENIZER.decode(tokens) == "a<eos>b<eos>"


def test_bos_leads_each_document_where_the_tokenizer_adds_one() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    first, second = Encoder(tokenizer).encode([[Segment("a", True)], [Segment("b", False)]])
    assert first[0][0] == second[0][0] == tokenizer.bos_token_id
    assert second[1] == [False, False, False]
    assert Encoder(TOKENIZER).encode([[Segment("a", True)]])[0][0][0] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"text": "a"}, "text"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),
        ({"messages": [], "text": "c"}, "messages"),
        ({"messages": None, "instruction": None, "output": None, "text": "c"}, "text"),  # a row of a mixed table
        ({"conversations": None, "instruction": "a", "output": "b"}, "alpaca"),
        ({"messages": None, "tools": []}, "messages"),
    ],
)
def test_the_shape_is_read_from_the_columns(fields: dict[str, Any], shape: str) -> None:
    assert detect_shape(fields, "auto") == shape


def test_unknown_columns_and_silent_assistants_are_reasons() -> None:
    with pytest.raises(RecordError, match="got body, title"):
        detect_shape({"title": "a", "body": "b"}, "auto")
    with pytest.raises(RecordError, match="no answer of the assistant"):
        documents_of({"messages": CHAT[:2]}, "messages", True, TOKENIZER)


def test_a_tokenizer_without_template_or_eos_is_refused() -> None:
    with pytest.raises(UserError, match="chat template"):
        documents_of({"messages": CHAT}, "messages", False, tiny_tokenizer(chat=False))
    with pytest.raises(UserError, match="no eos token"):
        Encoder(tiny_tokenizer(eos=False))

"""Conversations of every common form are read whole, laid out alike on every day, and learnt where they should be."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from lolcats_core.data.conversations import CHAT_DATE, identity, read_conversation
from lolcats_core.data.records import Encoder, documents_of, read_record
from lolcats_core.data.segments import RecordError, Segment
from tests.core.tiny import CHAT, sentencepiece_tokenizer, tiny_tokenizer

WEATHER = {
    "name": "get_weather",
    "description": "weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 C"},
    {"role": "assistant", "content": "It is 21 C."},
]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<|system|>{{ t.function.name }}: {{ t.function.description }}<|end|>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}{{ c.function.arguments|tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Reasoning stays in the last turn alone.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last else m.content.split('</think>')|last }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str, **changes: Any) -> Any:
    found = tiny_tokenizer(**changes)
    found.chat_template = template
    return found


def learnt(record: dict[str, Any], given: Any, completion: bool = True) -> list[tuple[str, str]]:
    """Text of the targets and of the rest, document by document."""
    found = []
    for tokens, targets in Encoder(given).encode(documents_of(record, "messages", completion, given)):
        parts = ([t for t, target in zip(tokens, targets, strict=True) if target == wanted] for wanted in (True, False))
        found.append(tuple(given.decode(part) for part in parts))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": CALLING, "tools": TOOLS},
        {"messages": [CALLING[0], {**CALLING[1], "content": None}, *CALLING[2:]], "tools": json.dumps(TOOLS)},
        {"messages": [CALLING[0], {**CALLING[1], "name": None}, *CALLING[2:]], "tools": [WEATHER]},
        {
            "messages": [
                CALLING[0],
                {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
                {"role": "function", "content": "21 C"},
                CALLING[3],
            ],
            "functions": [WEATHER],
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather in Paris?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "21 C"},
                {"from": "gpt", "value": "It is 21 C."},
            ],
            "tools": json.dumps([WEATHER]),
        },
    ],
    ids=["objects", "null content, tools as JSON", "null keys, bare tools", "functions", "ShareGPT"],
)
def test_tool_calls_of_every_form_are_one_conversation_whose_definitions_are_learnt(fields: dict[str, Any]) -> None:
    record = read_conversation(fields)
    assert record == {"messages": CALLING, "tools": TOOLS}
    assert identity(record) == identity({"messages": CALLING, "tools": TOOLS})
    given = tokenizer(TOOL_TEMPLATE)
    ((everything, rest),) = learnt(record, given, completion=False)
    assert everything.startswith("<|system|>get_weather: weather of a city<|end|><|user|>Weather in Paris?")
    assert rest == ""
    ((said, _),) = learnt(record, given)
    assert said == '<call>get_weather{"city": "Paris"}</call><|end|>It is 21 C.<|end|><eos>'


@pytest.mark.parametrize(
    ("template", "record", "part"),
    [
        (CHAT, {"messages": CALLING, "tools": TOOLS}, "`tools`, the definitions"),
        (CHAT, {"messages": CALLING}, "`tool_calls`, the calls"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            {"messages": [{"role": "system", "content": "be kind"}, *CALLING[::3]]},
            "a message of role system",
        ),
    ],
    ids=["tools", "tool calls", "system"],
)
def test_a_template_that_leaves_something_out_is_a_reason(template: str, record: dict[str, Any], part: str) -> None:
    with pytest.raises(RecordError, match=f"the chat template leaves out {part}"):
        documents_of(record, "messages", False, tokenizer(template))


def test_a_template_may_write_a_text_in_its_own_way() -> None:
    escaped = tokenizer("{% for m in messages %}{{ m.content|tojson }}{% endfor %}")
    record = {"messages": [{"role": "user", "content": 'a "b"\n'}, {"role": "assistant", "content": "c"}]}
    assert documents_of(record, "messages", False, escaped) == [[Segment('"a \\"b\\"\\n""c"', True, special=True)]]


def test_parts_roles_and_columns_of_other_forms_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    record = read_conversation(
        {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]}
    )
    assert record["messages"] == [{"role": "developer", "content": "x"}, {"role": "user", "content": "ab"}]
    ((segment,),) = documents_of(record, "messages", False, tokenizer(CHAT))
    assert segment.text == "<|system|>x<|end|><|user|>ab<|end|>"
    knowing = CHAT + "{# developer #}"
    assert documents_of(record, "messages", False, tokenizer(knowing))[0][0].text.startswith("<|developer|>x")
    with pytest.raises(RecordError, match="a part of type image_url, and only text"):
        read_conversation({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]})
    shared = {"system": "be kind", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    roles = [message["role"] for message in read_conversation(shared)["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert read_conversation({"messages": json.dumps(record["messages"])}) == record


@pytest.mark.parametrize("tools", ["no JSON", [1], '{"a": 1}', 3])
def test_tools_that_are_no_definitions_are_a_reason(tools: Any) -> None:
    with pytest.raises(RecordError, match="`tools` is not a list of tool definitions"):
        read_conversation({"messages": CALLING, "tools": tools})


@pytest.mark.parametrize("column", ["system", "history"])
def test_what_the_alpaca_prompt_has_no_place_for_is_a_reason(column: str) -> None:
    with pytest.raises(RecordError, match=f"has no place for `{column}`"):
        read_record({"instruction": "a", "output": "b", column: "c"}, "alpaca")


DATED = "{%- set today = strftime_now('%-d %B %Y') %}\n  {%- if strftime_now is defined %}On {{ today }}: {% endif %}"


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}\n"])
def test_a_template_s_date_is_the_same_on_every_day_and_the_rest_of_it_unchanged(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tokenizer(start + DATED + CHAT)
    record = {"messages": CALLING[::3]}

    class Clock(datetime.datetime):
        day = CHAT_DATE

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    there = given.apply_chat_template(record["messages"], tokenize=False)
    assert "On 26 July 2024: <|user|>" in there
    Clock.day += datetime.timedelta(days=1)
    assert given.apply_chat_template(record["messages"], tokenize=False) != there
    assert documents_of(record, "messages", False, given) == [[Segment(there, True, special=True)]]


def test_chatml_ends_a_document_once() -> None:
    """The template writes a line's end behind the end token."""
    given = tiny_tokenizer(specials=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    given.chat_template = CHATML
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    ((everything, _),) = learnt(record, given, completion=False)
    assert everything == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    ((said, rest),) = learnt(record, given)
    assert said == "Hello<|im_end|>\n"
    assert rest + said == everything


def test_answers_that_a_template_rewrites_later_are_learnt_as_they_are_written() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>y</think>d"},
    ]
    found = learnt({"messages": messages}, tokenizer(THINKING))
    assert found == [
        ("<think>x</think>b<|end|><eos>", "<|user|>a<|end|><|assistant|>"),
        ("<think>y</think>d<|end|><eos>", "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"),
    ]
    ((everything, _),) = learnt({"messages": messages}, tokenizer(THINKING), completion=False)
    assert everything.count("think") == 2
    with pytest.raises(RecordError, match=r"responses cannot be told apart: set `data\.loss_on: all`"):
        learnt({"messages": CALLING[::3]}, tokenizer(CHAT + "{% if add_generation_prompt %}<think>{% endif %}"))


def test_answers_of_weight_0_and_one_that_nothing_asked_for_are_not_learnt() -> None:
    messages = [{"role": "assistant", "content": "hello"}, *[dict(m) for m in CALLING[::3]], *CALLING[::3]]
    messages[2]["weight"] = 0
    ((said, rest),) = learnt({"messages": messages}, tokenizer(CHAT))
    assert said == "It is 21 C.<|end|><eos>"
    assert rest.count("21 C") == 1
    with pytest.raises(RecordError, match="no answer of the assistant"):
        learnt({"messages": messages[:3]}, tokenizer(CHAT))


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_a_sentencepiece_tokenizer_adds_no_space_that_the_text_does_not_have(scheme: str) -> None:
    given = sentencepiece_tokenizer(scheme)
    alpaca = {"instruction": "name it", "output": "The capital"}
    whole, mixed = (Encoder(given).encode(documents_of(alpaca, "alpaca", loss, given))[0] for loss in (False, True))
    text = "".join(segment.text for segment in documents_of(alpaca, "alpaca", True, given)[0])
    assert whole[0] == mixed[0] == [*given(text).input_ids, given.eos_token_id]
    assert "### Response:\nThe capital" in given.decode(mixed[0])
    assert given.decode([t for t, target in zip(*mixed, strict=True) if target]).strip() == "The capital</s>"

    given.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user'"
        " else ' ' + m.content + eos_token }}{% endfor %}"
    )
    record = {"messages": [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "The d"))]}
    whole, mixed = (Encoder(given).encode(documents_of(record, "messages", loss, given))[0] for loss in (False, True))
    assert whole[0] == mixed[0]
    assert given.decode(mixed[0]).replace("<s> ", "<s>") == "<s>[INST] hi [/INST] The d</s>"
    assert given.decode([t for t, target in zip(*mixed, strict=True) if target]).strip() == "The d</s>"


@pytest.mark.parametrize(
    ("texts", "targets"),
    [(("ab ", "cd"), "cd"), (("ab", " cd"), " cd"), (("ab\n", "\n\ncd"), "\ncd"), (("ab", "cd"), "cd")],
)
def test_a_token_over_a_boundary_is_a_target_if_it_holds_more_than_white_space_of_one(
    texts: tuple[str, str], targets: str
) -> None:
    given = tiny_tokenizer()
    tokens, marks = Encoder(given).encode([[Segment(texts[0], False), Segment(texts[1], True)]])[0]
    assert given.decode(tokens) == "".join(texts) + "<eos>"
    assert given.decode([t for t, mark in zip(tokens, marks, strict=True) if mark]).endswith(targets + "<eos>")

"""Conversations: many formats read as one, and one laid out by the tokenizer's own chat template.

Read are OpenAI's `messages` (content in parts, `tool_calls`, `tools`, the older `functions`) and ShareGPT's
`conversations` (`from`, `value`). A template that writes today's date is given `CHAT_DATE`, so that the same records
are the same rows on every day.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lolcats_core.data.segments import RecordError, Segment

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names, and those of OpenAI's first function calls.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
# The date that Llama 3's template writes where it has no clock.
CHAT_DATE = datetime.date(2024, 7, 26)
_DIRECTIVES = (
    *("%d", "%-d", "%e", "%a", "%A", "%b", "%B", "%m", "%-m", "%y"),
    *("%Y", "%j", "%F", "%x", "%H", "%I", "%M", "%S", "%p"),
)
_NO_PLACE = "; give the teacher's tokenizer a template that has a place for it, or leave it out of the records"


def read_conversation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A record's ``messages`` in OpenAI's form and its ``tools``, if it has any.

    What is no message stays as it is, for the schema to refuse.

    Raises:
        RecordError: a message has a part that is not text, or the tools are no definitions.
    """
    given = fields.get("messages") if fields.get("messages") is not None else fields.get("conversations")
    if given is None:
        return {}
    given = _from_json(given)
    messages = [_message(entry) for entry in given] if isinstance(given, list) else given
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    tools = _tools(fields.get("tools") or fields.get("functions"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _message(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", ""), **message}
    if message.get("role") == "function_call":
        calls = _from_json(message.pop("content", ""))
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if isinstance(role := message.get("role"), str):
        message["role"] = _ROLES.get(role, role)
    if isinstance(content := message.get("content"), list):
        message["content"] = "".join(map(_part, content))
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call")]
    calls = _from_json(message.pop("tool_calls", None))
    return {**message, "tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) and calls else message


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RecordError(f"a message has a part of type {kind}, and only text can be learnt")
    return text


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object: OpenAI writes JSON into a string, templates write it once more."""
    if not isinstance(call, dict):
        raise RecordError(f"`tool_calls` must hold objects with a function, got {type(call).__name__}")
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError("`tool_calls` must each name a function")
    arguments = _from_json(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments} if isinstance(arguments, dict) else function}


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = _from_json(given) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("`tools` is not a list of tool definitions")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _from_json(value: Any) -> Any:
    """What a text says in JSON; tables often hold lists and objects like that. Anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def identity(record: Mapping[str, Any]) -> str:
    """A text that two conversations share where they say the same, whatever a template makes of them."""
    parts = [json.dumps(record.get("tools"), sort_keys=True)]
    for message in record["messages"]:
        rest = {key: value for key, value in message.items() if key != "content"}
        parts += [json.dumps(rest, sort_keys=True), message.get("content", "").strip()]
    return "\0".join(parts)


def documents_of(
    record: Mapping[str, Any], completion_only: bool, tokenizer: PreTrainedTokenizerBase
) -> list[list[Segment]]:
    """The conversation as one document; as several where the template rewrites turns once others follow.

    Such a template (thinking models drop the reasoning of earlier turns) writes each answer after a beginning of its
    own, so with `completion_only` the answers that share none are learnt in documents of their own.

    Raises:
        RecordError: the template refuses the conversation or leaves a part of it out, or there is nothing to learn.
    """
    conversation = _Conversation(record, tokenizer)
    whole = conversation.text()
    conversation.check_complete(whole)
    if not completion_only:
        return [[Segment(whole, True, special=True)]]
    documents, segments, done = list[list[Segment]](), list[Segment](), ""
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before, after = conversation.text(index, prompt=True), conversation.text(index + 1)
        if not after.startswith(before):
            raise RecordError(
                "the chat template writes an answer otherwise than it asks for one, so responses cannot be told apart:"
                " set `data.loss_on: all`"
            )
        if not before.startswith(done):
            documents.append(segments)
            segments, done = [], ""
        # OpenAI's mark of an answer that is not to be learnt.
        learnt = message.get("weight") != 0
        segments += [
            Segment(before[len(done) :], False, special=True),
            Segment(after[len(before) :], learnt, special=True),
        ]
        done = after
    if whole.startswith(done):
        segments.append(Segment(whole[len(done) :], False, special=True))
    documents = [[part for part in document if part.text] for document in [*documents, segments]]
    documents = [document for document in documents if any(part.target for part in document)]
    if not documents:
        raise RecordError("no answer of the assistant, so nothing to learn with `data.loss_on: completion`")
    return documents


class _Conversation:
    """A conversation and the template that lays it out."""

    def __init__(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.tools = tokenizer, record.get("tools")
        self.template = _at_fixed_date(tokenizer.get_chat_template(None, self.tools))
        known = "developer" in self.template
        self.messages: list[dict[str, Any]] = [
            {**message, "role": "system"} if message["role"] == "developer" and not known else message
            for message in record["messages"]
        ]

    def text(self, count: int | None = None, prompt: bool = False) -> str:
        """The first `count` messages (all by default); with `prompt`, and the beginning of an answer."""
        return self._text(self.messages[:count], self.tools, prompt)

    def check_complete(self, whole: str) -> None:
        """Refuse a template that leaves out a part of the conversation, whose text is `whole`.

        Raises:
            RecordError: naming the part.
        """
        if self.tools and self._gives(whole, self.messages, None):
            raise RecordError("the chat template leaves out `tools`, the definitions of the tools" + _NO_PLACE)
        bare = [{"content": "", **message} for message in self.messages]
        for message in bare:
            message.pop("tool_calls", None)
        called = any("tool_calls" in message for message in self.messages)
        if called and self._gives(whole, bare, self.tools):
            raise RecordError("the chat template leaves out `tool_calls`, the calls of tools" + _NO_PLACE)
        for index, message in enumerate(self.messages):
            content = message.get("content", "")
            # A template may write a text otherwise; what stays the same with another text is not in it.
            if content.strip() and content.strip() not in whole:
                other = [*self.messages[:index], {**message, "content": content + "."}, *self.messages[index + 1 :]]
                if self._gives(whole, other, self.tools):
                    raise RecordError(f"the chat template leaves out a message of role {message['role']}" + _NO_PLACE)

    def _gives(self, text: str, messages: list[dict[str, Any]], tools: Any) -> bool:
        try:
            return self._text(messages, tools) == text
        except RecordError:
            return False

    def _text(self, messages: list[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:
            raise RecordError(f"the chat template refuses the conversation: {error}") from None


def _at_fixed_date(template: str) -> str:
    """The template with `CHAT_DATE` in place of the clock that transformers gives to it.

    A macro takes the name of the clock's function. The line's end behind it is not written (`trim_blocks`), and the
    template begins a line as before.
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace({name!r}, {CHAT_DATE.strftime(name)!r})" for name in _DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"

"""Generating and chatting at the command line: tokens as they come, one decode state for a whole conversation."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import lolcats_core as lc
from tasks.cli.generation import Conversation, Generator, Sampling, chat, stream
from tests.core.tiny import sentencepiece_tokenizer, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny model with a chat template (chat) and without (plain), and its teachers with softmax attention.

    `sliding` sees a window of 12 tokens.
    """
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=5,
    )
    teacher = LlamaForCausalLM(shape)
    student = lc.linearize(teacher, lc.LinearizeConfig(window_size=8, feature_dim=8))
    sliding = MistralForCausalLM(MistralConfig(**{**shape.to_dict(), "sliding_window": 12}))
    for name, model in (("chat", student), ("plain", student), ("teacher", teacher), ("sliding", sliding)):
        model.save_pretrained(root / name)
        tiny_tokenizer(chat=name != "plain").save_pretrained(root / name)
    return root


def say(path: Path, text: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat(path, Sampling(**{"max_new_tokens": 12, **options}))


@pytest.mark.parametrize("name", ["chat", "plain", "teacher", "sliding"])
def test_every_reply_is_what_the_whole_conversation_read_anew_gives(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(models / name, Sampling(20))
    conversation, asked, read = Conversation(generator), [], []
    original, forward = generator.stream, generator.model.forward

    def recorded(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        asked.append(ids)
        return original(ids, cache)

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(generator, "stream", recorded)
    monkeypatch.setattr(generator.model, "forward", counted)
    plain: Any = AutoModelForCausalLM.from_pretrained(models / name)
    for line in ("the quick brown fox", "def return", "import"):
        read.clear()
        seen = conversation.cache.get_seq_length()
        conversation.reply(line)
        assert torch.equal(plain.generate(asked[-1], use_cache=False, **generator.options), conversation.ids)
        # Each token is read once: the last of a reply with the next line.
        assert sum(read) == conversation.ids.shape[1] - 1 - seen


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_a_line_is_given_no_space_that_the_text_does_not_have(scheme: str, models: Path) -> None:
    generator = Generator(models / "plain", Sampling(5))
    for tokenizer in (sentencepiece_tokenizer(scheme), generator.tokenizer):
        generator.tokenizer = tokenizer
        for new in ("The capital", "\nThe", "\n\nThe", " The"):
            whole = torch.cat([generator.encode("name it", special=False), generator.encode_continuation(new)], 1)
            assert tokenizer.decode(whole[0]) == "name it" + new


def test_the_template_is_kept_over_turns(models: Path) -> None:
    conversation = Conversation(Generator(models / "chat", Sampling(5)))
    for line in ("fox", "dog"):
        conversation.reply(line)
    text = conversation.generator.tokenizer.decode(conversation.ids[0])
    answers = [message["content"] for message in conversation.messages[1::2]]
    assert text.startswith(f"<|user|>fox<|end|><|assistant|>{answers[0]}<|end|><|user|>dog<|end|><|assistant|>")


def test_a_template_that_rewrites_earlier_turns_is_read_again(models: Path) -> None:
    conversation = Conversation(Generator(models / "chat", Sampling(5)))
    conversation.generator.tokenizer.chat_template = (
        "{{ messages|length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    )
    conversation.reply("fox")
    conversation.reply("dog")
    text = conversation.generator.tokenizer.decode(conversation.ids[0])
    assert text.startswith("3<|user|>fox<|assistant|>")
    assert conversation.cache.get_seq_length() == conversation.ids.shape[1] - 1


def test_lines_without_a_terminal(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(models / "chat", "fox\n\n/reset\nfox\n/exit\nnever\n", monkeypatch)
    out, err = capsys.readouterr()
    assert "Started anew." in err
    assert "no chat template" not in err
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    assert "<|end|>" not in out
    say(models / "plain", "fox", monkeypatch)
    assert "no chat template: the model continues the text" in capsys.readouterr().err


def test_tokens_are_printed_as_they_come(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is written and flushed before the next token is computed."""
    written: list[int] = []
    steps = 0

    class Screen(io.StringIO):
        def flush(self) -> None:
            written.append(steps)

    from transformers import LlamaForCausalLM as Base

    forward = Base.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Base, "forward", counted)
    monkeypatch.setattr(sys, "stdout", Screen())
    stream(models / "plain", "the quick brown fox", Sampling(10))
    assert len(set(written)) >= 9


def test_a_repetition_penalty_breaks_a_greedy_loop_and_the_smallest_top_p_is_greedy(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(**options: float) -> str:
        stream(models / "plain", "the quick brown fox", Sampling(24, **options))  # type: ignore[arg-type]
        return capsys.readouterr().out

    greedy = written()
    assert written(temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert written(repetition_penalty=2.0) != greedy

"""Text from a model directory, printed token by token: one continuation, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, TextStreamer

from lolcats_common.errors import UserError
from lolcats_core import HybridCache, graphed_decoding, load_delta
from lolcats_core.compute.device import resolve_device, seed_everything
from lolcats_core.compute.numbers import check_folder
from lolcats_core.evaluation.generation import end_tokens
from lolcats_core.export.delta import DELTA
from lolcats_core.model.transformers_versions import CACHE
from tasks.runner.logs import quiet_progress_bars

RESET, EXIT = "/reset", "/exit"


@dataclass(frozen=True)
class Sampling:
    """How text is written. `temperature` 0 decodes greedily, and then `top_p` and `seed` say nothing.

    `top_p`: the next token is one of the most probable that have this probability together. `repetition_penalty`:
    logits of tokens that stand in the text already are divided by it where positive, multiplied where negative.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Generator:
    """A model with its tokenizer, and how to take the next token."""

    def __init__(self, path: Path, sampling: Sampling) -> None:
        """Load a merged model, a delta or a model with softmax attention, such as the teacher.

        Raises:
            UserError: the model does not load, or a weight of it is NaN, infinite or no floating point.
        """
        quiet_progress_bars()
        device = resolve_device("auto")
        check_folder(path, str(path))
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            if (path / DELTA).is_file():
                model: Any = load_delta(path, merge=True, device=device)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} does not load as a model: {str(error).splitlines()[0]}") from error
        self.model = model.to(device).eval()
        self.options: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature or None,
            "top_k": None,
            "top_p": sampling.top_p if sampling.temperature > 0 else None,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": end_tokens(self.model, self.tokenizer) or None,
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        }
        seed_everything(sampling.seed)

    def encode(self, text: str, special: bool = True) -> torch.Tensor:
        """Token ids [1, T] of a text; `special` adds what the tokenizer puts around one."""
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        return ids.to(device=self.model.device, dtype=torch.long)

    def encode_continuation(self, text: str) -> torch.Tensor:
        """Token ids [1, T] of a text that goes on from another; by itself it may be given a space to begin with."""
        before, both = (self.encode(part, special=False) for part in ("\n", "\n" + text))
        seen = before.shape[1]
        return both[:, seen:] if torch.equal(both[:, :seen], before) else self.encode(text, special=False)

    def empty_cache(self) -> Cache:
        """A decode state that has seen nothing."""
        config = self.model.config
        return HybridCache(config) if hasattr(config, "linearize") else DynamicCache(config=config)

    def stream(self, ids: torch.Tensor, cache: Cache | None = None, skip_prompt: bool = True) -> torch.Tensor:
        """Print the continuation of `ids` [1, T], of which `cache` may have seen a beginning; all ids [1, T + new]."""
        with graphed_decoding(self.model):
            out: torch.Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=TextStreamer(self.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True),
                **{CACHE: cache},
                **self.options,
            )
        return out


def stream(path: Path, prompt: str, sampling: Sampling) -> None:
    """Print `prompt` and its continuation to standard output.

    Raises:
        UserError: the model does not load, or the prompt is empty.
    """
    generator = Generator(path, sampling)
    ids = generator.encode(prompt)
    if ids.shape[1] == 0:
        raise UserError("PROMPT must hold at least one character, got ''")
    generator.stream(ids, skip_prompt=False)


class Conversation:
    """Turns that continue one decode state: each reads the new text alone, however long the conversation is."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.template = bool(generator.tokenizer.chat_template)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages: list[dict[str, str]] = []
        self.text = ""  # the conversation so far as the model has it, without the last reply's end token
        self.ids = torch.empty(1, 0, dtype=torch.long, device=self.generator.model.device)
        self.cache = self.generator.empty_cache()

    def reply(self, line: str) -> None:
        """Print the model's answer to `line` (with a chat template) or its continuation of the text (without)."""
        tokenizer = self.generator.tokenizer
        if self.template:
            self.messages.append({"role": "user", "content": line})
            whole = tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
            if not whole.startswith(self.text):  # a template that rewrites earlier turns: read them again
                messages = self.messages
                self.reset()
                self.messages = messages
        else:
            whole = f"{self.text}\n{line}" if self.text and not self.text.endswith("\n") else self.text + line
        if self.text:
            new = self.generator.encode_continuation(whole[len(self.text) :])
        else:
            new = self.generator.encode(whole, special=not self.template)
        # The end token that closed the last reply is in the template's text as well.
        ended = self.ids.shape[1] > 0 and int(self.ids[0, -1]) in (self.generator.options["eos_token_id"] or [])
        asked = torch.cat([self.ids[:, :-1] if ended else self.ids, new], 1)
        if new.shape[1] == 0:
            return
        self.ids = self.generator.stream(asked, self.cache)
        said = tokenizer.decode(self.ids[0, asked.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        self.text = whole + said


def chat(path: Path, sampling: Sampling) -> None:
    """Answer each line of standard input until it ends or says /exit; /reset starts a new conversation.

    Raises:
        UserError: the model does not load.
    """
    conversation = Conversation(Generator(path, sampling))
    if not conversation.template:
        print(
            "The tokenizer has no chat template: the model continues the text, and each line adds to it.",
            file=sys.stderr,
        )
    print(f"{RESET} starts anew, {EXIT} ends.", file=sys.stderr)
    try:
        for line in _typed() if sys.stdin.isatty() else sys.stdin:
            if line.strip() == EXIT:
                return
            if line.strip() == RESET:
                conversation.reset()
                print("Started anew.", file=sys.stderr)
            elif line.strip():
                conversation.reply(line.rstrip("\n"))
    except (EOFError, KeyboardInterrupt):
        print()


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  (line editing and history for `input`)

    while True:
        yield input("> ")

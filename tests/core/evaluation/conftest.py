"""Models that a byte-level tokenizer fits, as fixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from tests.core.tiny import byte_teacher, byte_tokenizer


class Memorizer(LlamaForCausalLM):
    """Knows one text by heart: predicts what follows the last 40 tokens in it, and nothing elsewhere."""

    def know(self, ids: list[int]) -> Memorizer:
        self.known = "".join(map(chr, ids))
        return self

    def forward(self, input_ids: Tensor, **kwargs: object) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            text = "".join(map(chr, ids))
            for place in range(40, len(text)):
                found = self.known.find(text[place - 39 : place + 1])
                if 0 <= found < len(self.known) - 40:
                    logits[row, place, ord(self.known[found + 40])] = 20.0
        return CausalLMOutput(logits=logits)


class Copier(LlamaForCausalLM):
    """Predicts what followed the longest earlier occurrence of its last tokens: perfect recall, or within `reach`."""

    reach: int | None = None

    def forward(self, input_ids: Tensor, **kwargs: object) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            text = "".join(map(chr, ids))
            for place in range(1, len(text)):
                start = 0 if self.reach is None else max(0, place + 1 - self.reach)
                for size in (24, 16, 12, 8, 5, 3):
                    found = text.rfind(text[max(0, place + 1 - size) : place + 1], start, place)
                    if found >= 0 and place + 1 >= size:
                        logits[row, place, ord(text[found + size])] = 20.0
                        break
        return CausalLMOutput(logits=logits)


class Constant(LlamaForCausalLM):
    """Predicts one token, whatever it reads."""

    token = 65

    def forward(self, input_ids: Tensor, **kwargs: object) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., self.token] = 20.0
        return CausalLMOutput(logits=logits)


@pytest.fixture(scope="session")
def copier() -> Copier:
    return Copier(byte_teacher().config).eval()


@pytest.fixture(scope="session")
def window_only() -> Copier:
    """A copier that sees its last 48 tokens alone."""
    model = Copier(byte_teacher().config).eval()
    model.reach = 48
    return model


@pytest.fixture(scope="session")
def constant() -> Constant:
    return Constant(byte_teacher().config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return byte_teacher()


@pytest.fixture(scope="session")
def memorizer() -> Memorizer:
    return Memorizer(byte_teacher().config).eval()

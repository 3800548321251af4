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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return byte_teacher()


@pytest.fixture(scope="session")
def memorizer() -> Memorizer:
    return Memorizer(byte_teacher().config).eval()

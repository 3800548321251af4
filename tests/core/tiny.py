"""Tiny random models, tokenizers and token rows for tests."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.modeling import linearize, named_map_parameters

VOCAB = 97
SETTINGS = LinearizeConfig(window_size=8, feature_dim=8)
# One layer of each kind: linearized, softmax, and both in one.
MIXED = LinearizeConfig(window_size=8, feature_dim=8, softmax_layers=(1,), softmax_heads={2: (1,)})
# The same with a state of constant size.
BOUNDED = dataclasses.replace(MIXED, softmax_window=10, softmax_sinks=3)
# Two means of values, mixed; first tokens in every softmax, features of unrotated q and k.
MIXTURE = dataclasses.replace(
    MIXED,
    feature_dim=4,
    window_sinks=3,
    combine="mixture",
    feature_positions="unrotated",
    k_map_per="kv_head",
    linear_decay=0.9,
)
# Groups of one layer with windows of their own beside others that see everything or are linearized.
RINGS = dataclasses.replace(MIXED, softmax_layers=(0,), softmax_windows={0: {0: 10}, 2: {1: 17}}, softmax_sinks=3)

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_teacher(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `family`: 3 layers, 4 query heads, 2 key/value heads (4 of GPT-NeoX), head dim 8.

    Gemma's middle layer is local, with a window of 12 tokens.
    """
    config_class, model_class = FAMILIES[family].resolve()
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt_neox":
        del values["num_key_value_heads"], values["head_dim"]  # it has as many as query heads
    if family.startswith("gemma"):
        values |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 12}
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(**values | changes))
    if family == "gemma2":
        model.set_attn_implementation("eager")  # before 5.19, transformers' default did not bound its scores
    return model.to(dtype).eval()


def tiny_student(family: str = "llama", settings: LinearizeConfig = MIXED, **changes: Any) -> Any:
    """`tiny_teacher(family, **changes)`, linearized with maps and factors that are not their initial values."""
    model = linearize(tiny_teacher(family, **changes), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in named_map_parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn - 1 if name.endswith("window_factor") else parameter + 0.3 * drawn)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length] without the special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def decode(model: Any, ids: torch.Tensor, split: int) -> torch.Tensor:
    """Logits [B, T, V] of a prefill of `split` tokens followed by one token at a time."""
    parts, cache = [], None
    for start, stop in itertools.pairwise([0, *range(split, ids.shape[1] + 1)]):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


def padded(rows: Sequence[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, T_i] as one batch (input_ids, attention_mask) with zeros on the `left` or `right`."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - row.shape[1], longest) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def tiny_tokenizer(
    chat: bool = True, eos: bool | str = True, bos: bool = False, specials: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries; every string has a lossless encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *specials]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox def return import " * 20], trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=("<eos>" if eos is True else eos) or None,
        bos_token="<bos>" if bos else None,
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def sentencepiece_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """BPE over "▁" for spaces, as of Llama 2 and Mistral, which begins a text with one.

    Args:
        scheme: ``prepend`` (a normalizer), or Metaspace's ``first`` or ``always``.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=180,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*string.printable[:95], "\n", "▁"],
        show_progress=False,
    )
    text = "Below is an instruction that describes a task Write a response name it The capital hi"
    tokenizer.train_from_iterator(text.split(), trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{symbol: index + 1 for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def byte_teacher(**changes: Any) -> Any:
    """A random Llama of two layers with the vocabulary of `byte_tokenizer`."""
    values = {"vocab_size": 257, "num_hidden_layers": 2, "max_position_embeddings": 1024, "initializer_range": 0.02}
    return tiny_teacher(**values | changes)


class FakeRows:
    """Token rows in memory, with the interface of `TokenRows`."""

    def __init__(
        self, rows: int = 24, length: int = 40, seed: int = 0, documents: bool = False, below: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        self.sequence_length, self.documents = length, documents
        # Where rows begin: at 0, or anywhere below `below` (`data.position_range`).
        self.places = None if below is None else torch.randint(below - length + 1, (rows, 1), generator=generator)

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        batch = {"input_ids": self.input_ids[torch.as_tensor(np.asarray(indices))]}
        if self.documents:
            cut = self.sequence_length // 3
            row = torch.cat([torch.arange(cut), torch.arange(self.sequence_length - cut)])
            batch["position_ids"] = row.expand(len(batch["input_ids"]), -1)
        if self.places is not None:
            positions = batch.get("position_ids", torch.arange(self.sequence_length))
            batch["position_ids"] = positions + self.places[torch.as_tensor(np.asarray(indices))]
        return batch

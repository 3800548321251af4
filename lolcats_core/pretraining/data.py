"""From sources to training rows: byte-level BPE, token arrays, and copy rows that teach long-range recall.

# B rows, T tokens, N tokens of the corpus, V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lolcats_common.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100
# Line breaks with the indentation that follows; words with one leading space and underscores; up to three digits;
# punctuation; what is left. Indentation of any depth is one piece, so it becomes one token.
PIECES = r"(?:\n[ \t]*)+| ?_*\p{L}+| ?\p{N}{1,3}| ?_+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose entry 0 is the end-of-text token; any bytes round-trip.

    Raises:
        UserError: the texts do not give `vocab_size` entries.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the corpus gives a vocabulary of {tokenizer.get_vocab_size()}, `vocab_size` asks for {vocab_size}; "
            "lower it or add sources"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write `tokenizer` the way `AutoTokenizer.from_pretrained` reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def encode(tokenizer: Tokenizer, texts: Sequence[str], chunk: int = 512) -> np.ndarray:
    """int16 [N]: each text after one end-of-text token. The vocabulary must stay under 2^15."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.empty(0, np.int16)]
    for i in range(0, len(texts), chunk):
        for encoding in tokenizer.encode_batch_fast(list(texts[i : i + chunk]), add_special_tokens=False):
            parts.append(np.array([end, *encoding.ids], dtype=np.int16))
    return np.concatenate(parts)


def sample_texts(texts: Sequence[str], max_bytes: int, seed: int) -> Iterator[str]:
    """Whole texts in a fixed random order until `max_bytes` characters are reached."""
    size = 0
    for i in np.random.default_rng(seed).permutation(len(texts)):
        if size >= max_bytes:
            return
        size += len(texts[i])
        yield texts[i]


class WindowStarts:
    """Training rows by their place in the corpus alone; the tokens stay on the device (`training_rows`)."""

    def __init__(self, tokens: int, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        # Two rows less: a window starts up to one row later than its place, and needs one token more than a row.
        self._count = max(0, tokens // sequence_length - 2)

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """``start`` int64 [n]."""
        return {"start": torch.from_numpy(np.asarray(indices, dtype=np.int64) * self.sequence_length)}


def training_rows(
    tokens: Tensor, starts: Tensor, sequence_length: int, vocab_size: int, copy_share: float, max_gap: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one micro-batch; the first `copy_share` of its rows become copy rows.

    Randomness comes from the device's default generator, which step checkpoints keep.

    Args:
        tokens: int16 [N] on the device.
        starts: int64 [B], windows' places; each window is moved by up to one row at random.

    Returns:
        (inputs int64 [B, T], targets int64 [B, T], `IGNORED` where a copy row's target cannot be known).
    """
    device = tokens.device
    starts = starts + torch.randint(0, sequence_length, starts.shape, device=device)
    offsets = torch.arange(sequence_length + 1, device=device)
    rows = tokens[starts[:, None] + offsets].long()
    copies = int(copy_share * len(rows) + 0.5)
    targets = rows[:, 1:].clone()
    if copies:
        rows[:copies], known = copy_rows(rows[:copies], tokens, vocab_size, max_gap)
        targets[:copies] = torch.where(known, rows[:copies], IGNORED)[:, 1:]
    return rows[:, :-1], targets


def copy_rows(text: Tensor, tokens: Tensor, vocab_size: int, max_gap: int) -> tuple[Tensor, Tensor]:
    """Rows in which strings come again, each row at its own distance ("gap") of 8 to `max_gap` tokens.

    A row is a run of `text`, then pairs of blocks of `gap` tokens: a new string and its copy, in half of the rows
    after a filler of up to half the gap. Strings are uniform random tokens (half of the rows), tokens of the
    corpus in random order (a quarter), or running text (a quarter).

    Args:
        text: int64 [B, T], running text. tokens: int16 [N], the corpus.

    Returns:
        (rows int64 [B, T], known bool [B, T]: the token is a copy, and so is the one before it).
    """
    count, length = text.shape
    device = text.device

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device)

    kind = integers(0, 4, count, 1)
    uniform = integers(1, vocab_size, count, length)
    shuffled = tokens[integers(0, len(tokens), count, length)].long()
    base = torch.where(kind < 2, uniform, torch.where(kind == 2, shuffled, text))
    gap = integers(8, max_gap + 1, count, 1)
    filler = (torch.rand(count, 1, device=device) * gap / 2).long() * integers(0, 2, count, 1)
    lead = integers(0, 32, count, 1) * integers(0, 2, count, 1)
    place = torch.arange(length, device=device)
    past_lead = place - lead
    inside = past_lead % gap
    copied = (past_lead >= 0) & (past_lead // gap % 2 == 1) & (inside >= filler)
    base = torch.where(past_lead >= 0, base, text)
    rows = base.gather(1, torch.where(copied, place - gap, place))
    return rows, copied & (inside > filler)

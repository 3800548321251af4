"""Perplexity over token rows, of a model and of a bigram baseline.

# B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lolcats_common.errors import DivergedError, UserError
from lolcats_core.compute import distributed
from lolcats_core.model.forward import (
    MAX_FLOAT_LOGITS,
    causal_logits,
    evaluating,
    model_device,
    rows_per_forward,
)
from lolcats_core.training.loop import Rows


@dataclass(frozen=True)
class PerplexityResult:
    """`loss` and `bits`: mean cross-entropy per predicted token, in nats and in bits; `perplexity`: exp(loss)."""

    perplexity: float
    loss: float
    bits: float
    tokens: int

    @classmethod
    def from_sum(cls, total: float, tokens: int) -> PerplexityResult:
        """From the summed cross-entropy in nats."""
        loss = total / tokens
        return cls(perplexity=math.exp(min(loss, 700.0)), loss=loss, bits=loss / math.log(2), tokens=tokens)


def next_token_targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What each position has to predict, and which of that counts.

    A target counts when `loss_mask` (if there is one) says so and it is not the first token of a packed document
    (`position_ids` 0), of which nothing can be known.

    Args:
        batch: ``input_ids`` int64 [B, T]; optional ``loss_mask`` bool [B, T], ``position_ids`` int64 [B, T].

    Returns:
        (targets int64 [B, T-1], counted bool [B, T-1]).
    """
    targets = batch["input_ids"][:, 1:]
    counted = torch.ones_like(targets, dtype=torch.bool)
    if batch.get("loss_mask") is not None:
        counted &= batch["loss_mask"][:, 1:].bool()
    if batch.get("position_ids") is not None:
        counted &= batch["position_ids"][:, 1:] != 0
    return targets, counted


def perplexity(
    model: nn.Module,
    rows: Rows,
    *,
    batch_size: int,
    max_rows: int | None = None,
    device: torch.device | str | None = None,
    name: str = "the model",
    on_rows: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Next-token perplexity over the first `max_rows` rows (all by default), with the loss in fp32, summed in fp64.

    The model runs as it is: in its own dtype, or under the caller's `torch.autocast`. Memory is bounded by the logits
    of one row or `lolcats_core.model.forward.MAX_LOGITS`, whichever is more, so `batch_size` is a maximum.
    Several processes divide the batches between them, and each returns the result of all.

    Args:
        device: where the batches go; by default where the model is.
        name: what errors call the model.
        on_rows: called with the number of rows after each forward pass.

    Raises:
        UserError: there is no token to predict, or the loss is NaN or infinite.
    """
    device = torch.device(device) if device is not None else model_device(model)
    total, tokens = 0.0, 0
    step = rows_per_forward(batch_size, int(rows.sequence_length), _vocab_size(model, rows))
    count = len(rows) if max_rows is None else min(len(rows), max_rows)
    with evaluating(model):
        for first, real in distributed.rounds(range(0, count, step)):
            batch = rows.batch(range(first, min(first + step, count)))
            batch = {column: values.to(device) for column, values in batch.items()}
            targets, counted = next_token_targets(batch)
            logits = causal_logits(model, batch["input_ids"], batch.get("position_ids"))[:, :-1]
            loss = summed_cross_entropy(logits, targets, counted)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss of {name} is {loss} in rows {first} to {first + len(targets) - 1}; it has diverged: "
                    "lower the learning rate of the stage that trained it, or use `compute.precision: float32`"
                )
            total += loss * real
            tokens += int(counted.sum()) * int(real)
            if on_rows is not None:
                on_rows(len(targets))
    sums = distributed.total(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
    total, tokens = sums[0], int(sums[1])
    return PerplexityResult.from_sum(total, _require_tokens(tokens, rows))


def bigram_perplexity(
    train_rows: Rows,
    rows: Rows,
    vocab_size: int,
    *,
    max_rows: int | None = None,
    max_train_rows: int | None = None,
    weights: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1000, 3000),
) -> PerplexityResult:
    """Perplexity of an interpolated bigram model, the baseline that a language model has to be far below.

        p(b | a) = (count(a, b) + w p(b)) / (count(a) + w),   p(b) = (count(b) + 1) / (N + V)

    The weight w of the unigram is the best of `weights` on the evaluated rows themselves, which favours the baseline.
    Only pairs that occur in the evaluated rows are counted, so memory is O(V + evaluated tokens) for any corpus.

    Raises:
        UserError: there is nothing to count or to predict, or a token lies outside the vocabulary.
    """
    # Each pair (a, b) is the number a V + b.
    seen = [np.empty(0, dtype=np.int64)]
    for _, batch in _batches(rows, 256, max_rows):
        seen.append(np.ravel(_pairs(batch, vocab_size)))
    pairs, repeats = np.unique(np.concatenate(seen), return_counts=True)
    tokens = _require_tokens(int(repeats.sum()), rows)

    pair_counts = np.zeros(len(pairs), dtype=np.int64)
    contexts = np.zeros(vocab_size, dtype=np.int64)
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    for _, batch in _batches(train_rows, 256, max_train_rows):
        codes = _pairs(batch, vocab_size)
        contexts += np.bincount(codes // vocab_size, minlength=vocab_size)
        unigrams += np.bincount(codes % vocab_size, minlength=vocab_size)
        at = np.minimum(np.searchsorted(pairs, codes), len(pairs) - 1)
        pair_counts += np.bincount(at[pairs[at] == codes], minlength=len(pairs))
    _require_tokens(int(contexts.sum()), train_rows)

    before, after = pairs // vocab_size, pairs % vocab_size
    unigram = (unigrams[after] + 1.0) / (unigrams.sum() + vocab_size)
    totals = [
        -float(np.dot(repeats, np.log((pair_counts + weight * unigram) / (contexts[before] + weight))))
        for weight in weights
    ]
    return PerplexityResult.from_sum(min(totals), tokens)


def _pairs(batch: dict[str, Tensor], vocab_size: int) -> np.ndarray:
    """The counted (previous, next) pairs of a batch as numbers previous * V + next, int64 [pairs]."""
    targets, counted = next_token_targets(batch)
    highest = int(batch["input_ids"].max())
    if highest >= vocab_size:
        raise UserError(f"token {highest} lies outside the vocabulary of {vocab_size}; prepare the rows again")
    codes = batch["input_ids"][:, :-1] * vocab_size + targets
    return codes[counted].cpu().numpy()


def summed_cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor) -> float:
    """Sum over counted targets, a slice of positions at a time so that the fp32 copy of the logits stays small."""
    vocab_size = logits.shape[-1]
    width = max(1, MAX_FLOAT_LOGITS // (vocab_size * len(logits)))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target, keep in zip(
        logits.split(width, dim=1), targets.split(width, dim=1), counted.split(width, dim=1), strict=True
    ):
        losses = F.cross_entropy(part.float().flatten(0, 1), target.flatten(), reduction="none")
        # Positions that do not count may hold anything, NaN included.
        total += torch.where(keep.flatten(), losses, 0.0).sum(dtype=torch.float64)
    return float(total)


def _batches(rows: Rows, size: int, max_rows: int | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    count = len(rows) if max_rows is None else min(len(rows), max_rows)
    for first in range(0, count, size):
        yield first, rows.batch(range(first, min(first + size, count)))


def _vocab_size(model: nn.Module, rows: Rows) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or getattr(rows, "vocab_size", None) or 1)


def _require_tokens(tokens: int, rows: Rows) -> int:
    if tokens == 0:
        raise UserError(
            f"{len(rows)} rows of {rows.sequence_length} tokens hold no token to predict; "
            "give more data, or check `data.loss_on` and `data.sequence_length`"
        )
    return tokens

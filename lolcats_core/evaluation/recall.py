"""Copying recall: what a model still knows of tokens that lie a given distance back.

# B batch, G gap, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lolcats_common.errors import UserError
from lolcats_core.model.forward import causal_logits, evaluating, model_device, rows_per_forward

# The first tokens of the second copy cannot be known: nothing has yet said that a copy began, or where.
SKIPPED = 4


@dataclass(frozen=True)
class RecallResult:
    """`value`: mean share of tokens recalled, in [0, 1]; `stderr`: standard error of that mean over `samples`."""

    value: float
    stderr: float
    samples: int


def random_strings(vocab_size: int, gap: int, samples: int, seed: int, exclude_ids: Iterable[int] = ()) -> np.ndarray:
    """Uniform random tokens, int64 [samples, gap].

    Row i depends on (seed, gap, i) alone, so more samples add rows and change none.

    Raises:
        UserError: fewer than two tokens are left to draw from.
    """
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(exclude_ids, dtype=np.int64))
    if len(allowed) < 2:
        raise UserError(f"recall needs a vocabulary of at least 2 ordinary tokens, got {len(allowed)} of {vocab_size}")
    rows = [np.random.default_rng([seed, gap, row]).integers(len(allowed), size=gap) for row in range(samples)]
    return allowed[np.stack(rows)]


def copy_recall(
    model: nn.Module,
    vocab_size: int,
    gaps: Sequence[int],
    samples: int,
    seed: int,
    batch_size: int,
    exclude_ids: Iterable[int] = (),
    *,
    prefix_ids: Sequence[int] = (),
    on_samples: Callable[[int], None] | None = None,
) -> dict[int, RecallResult]:
    """Show a random string of `gap` tokens twice and count the second copy's tokens that the model predicts.

    Each token of the second copy (its first 4 apart) counts when the model's argmax, given everything before it, is
    that token. Which strings are shown depends on `seed` alone, not on the batch size.

    Args:
        gaps: lengths of the string, each the distance between a token and its copy.
        exclude_ids: tokens that never occur in the strings, such as special tokens.
        prefix_ids: tokens put before the string, such as the beginning-of-sequence token.
        on_samples: called with the number of sequences after each forward pass.

    Raises:
        UserError: a gap is at most 4, there are no samples, or the vocabulary is too small.
    """
    device = model_device(model)
    excluded = tuple(exclude_ids)
    if samples < 1:
        raise UserError(f"`recall_samples` must be at least 1, got {samples}")
    results: dict[int, RecallResult] = {}
    for gap in gaps:
        if gap <= SKIPPED:
            raise UserError(f"a recall gap must be greater than {SKIPPED}, got {gap}")
        strings = torch.from_numpy(random_strings(vocab_size, gap, samples, seed, excluded))
        prefix = torch.tensor(list(prefix_ids), dtype=torch.int64).expand(samples, -1)
        input_ids = torch.cat([prefix, strings, strings], dim=1)
        first = len(prefix_ids) + gap + SKIPPED
        step = rows_per_forward(batch_size, input_ids.shape[1], vocab_size)
        shares: list[float] = []
        with evaluating(model):
            for ids in input_ids.split(step):
                ids = ids.to(device)
                predicted = causal_logits(model, ids)[:, first - 1 : -1].argmax(dim=-1)
                shares += (predicted == ids[:, first:]).double().mean(dim=1).tolist()
                if on_samples is not None:
                    on_samples(len(ids))
        results[gap] = RecallResult(*mean_and_stderr(shares), samples=samples)
    return results


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt n; 0 for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0
    return float(array.mean()), spread

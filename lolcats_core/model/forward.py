"""Running a causal language model for measurement: no gradients, evaluation mode, bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Logits are the largest tensor of an evaluation: [rows, tokens, vocabulary]. A forward pass holds at most this many
# of them (one row is always allowed), and at most a quarter of that is turned to fp32 at a time.
MAX_LOGITS = 256 * 2**20
MAX_FLOAT_LOGITS = MAX_LOGITS // 4


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's earlier mode comes back when the block ends."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a module that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def rows_per_forward(batch_size: int, length: int, vocab_size: int) -> int:
    """Rows of `length` tokens in one forward pass: `batch_size`, or fewer when their logits pass `MAX_LOGITS`."""
    return max(1, min(batch_size, MAX_LOGITS // max(1, length * vocab_size)))


def causal_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Logits of a Hugging Face causal language model.

    Args:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T] or None; restarting at 0 for each document packed into a row, which is what keeps
            the documents from attending to each other.

    Returns:
        [B, T, V] in the model's dtype.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return model(input_ids=input_ids, use_cache=False, **positions).logits

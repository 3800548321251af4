"""Loss by position: whether a model still uses its context where it is longer than the rows it was trained on.

# B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lolcats_common.records import PositionRange
from lolcats_core.model.forward import causal_logits, evaluating, model_device
from lolcats_core.training.loop import Rows
from lolcats_core.training.perplexity import next_token_targets

FIRST_BUCKET = 64
# Positions whose logits are turned to fp32 at a time.
WIDTH = 512


def joined_rows(rows: Rows, length: int, count: int) -> dict[str, Tensor]:
    """`count` rows of `length` tokens, each of consecutive rows put together, or fewer where the text ends.

    Rows of packed documents are not joined (a document would run into the next): they come as they are.

    Returns:
        A batch as of `Rows`: input_ids [n, T] and, where there are any, loss_mask and position_ids.
    """
    size = int(rows.sequence_length)
    packed = "position_ids" in rows.batch([0])
    each = 1 if packed else max(1, length // size)
    count = min(count, len(rows) // each)
    batch = rows.batch(range(count * each))
    return {name: values.reshape(count, each * size) for name, values in batch.items()}


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of positions that double in size: [0, 64), [64, 128), [128, 256), … up to `length`."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(start, min(stop, length)) for start, stop in itertools.pairwise(edges)]


def position_losses(
    model: nn.Module, batch: dict[str, Tensor], *, on_rows: Callable[[int], None] | None = None
) -> Tensor:
    """[B, T - 1] float64, loss in nats of each next token, one row at a time; NaN where a token does not count.

    Args:
        batch: of `joined_rows`.
    """
    device = model_device(model)
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluating(model):
        for row in range(len(batch["input_ids"])):
            one = {name: values[row : row + 1].to(device) for name, values in batch.items()}
            targets, counted = next_token_targets(one)
            logits = causal_logits(model, one["input_ids"], one.get("position_ids"))[0, :-1]
            parts = zip(logits.split(WIDTH), targets[0].split(WIDTH), strict=True)
            losses.append(torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]).double().cpu())
            counts.append(counted[0].cpu())
            if on_rows is not None:
                on_rows(1)
    return torch.stack(losses).masked_fill(~torch.stack(counts), float("nan"))


def loss_by_position(losses: Tensor) -> list[PositionRange]:
    """Mean of each range of positions; the position of a loss is that of the token predicted.

    Args:
        losses: of `position_losses`.

    Returns:
        Per range its ``start``, ``stop``, ``loss`` in nats, ``stderr`` of that mean and the ``tokens`` counted.
    """
    found: list[PositionRange] = []
    for start, stop in buckets(losses.shape[1] + 1):
        inside = losses[:, max(0, start - 1) : stop - 1]
        chosen = inside[~inside.isnan()]
        if len(chosen) > 1:
            found.append(
                {
                    "start": start,
                    "stop": stop,
                    "loss": float(chosen.mean()),
                    "stderr": float(chosen.std() / len(chosen) ** 0.5),
                    "tokens": len(chosen),
                }
            )
    return found

"""Perplexity and logits of a model that does not fit: each layer is read once and sees every row.

# B batch, T tokens, d hidden size, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from lolcats_common.errors import DivergedError, UserError
from lolcats_common.progress import progress
from lolcats_core.model.forward import rows_per_forward
from lolcats_core.streaming.buffer import HiddenBuffer
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.training.loop import Rows
from lolcats_core.training.perplexity import PerplexityResult, next_token_targets, summed_cross_entropy


def streamed_logits(
    model: LayerwiseModel,
    rows: Rows,
    *,
    batch_size: int,
    max_rows: int | None = None,
    folder: Path | None = None,
    label: str = "layer by layer",
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of the first `max_rows` rows, each with its logits [B, T, V], after one pass over the layers.

    Args:
        folder: keep the hidden states in a file there, removed at the end; None keeps them in memory.
        label: of the progress, which counts layers.

    Raises:
        UserError: the weights lack a tensor, or the hidden states do not fit on the disk.
    """
    count = len(rows) if max_rows is None else min(len(rows), max_rows)
    if count == 0:
        return
    config: Any = model.model.config
    step = rows_per_forward(batch_size, rows.sequence_length, config.vocab_size)
    buffer = HiddenBuffer(
        count,
        rows.sequence_length,
        config.hidden_size,
        model.dtype,
        step,
        folder=folder,
        device=model.device,
        resume=False,
    )

    def advance(target: int, compute: Callable[[Tensor | None, dict[str, Tensor]], Tensor | None]) -> None:
        for block in range(buffer.blocks):
            for row_indices, batch in batches(buffer.block_rows(block)):
                hidden = None if target == 0 else buffer.read(target - 1, row_indices)
                buffer.write(target, row_indices, cast(Tensor, compute(hidden, batch)))
            buffer.flush()
            buffer.commit(target, block)

    def batches(block: range) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        for start in range(block.start, block.stop, step):
            row_indices = np.arange(start, min(start + step, block.stop))
            yield row_indices, {name: value.to(model.device) for name, value in rows.batch(row_indices).items()}

    try:
        with model.end("embedding"):
            advance(0, lambda _, batch: model.embed(batch))
        with progress(len(model.layers), label) as shown:
            for index in range(len(model.layers)):

                def compute(hidden: Tensor | None, batch: dict[str, Tensor], index: int = index) -> Tensor | None:
                    return model.forward_layer(index, cast(Tensor, hidden), batch)

                with model.layer(index):
                    advance(index + 1, compute)
                shown.update(1)
        with model.end("head"):
            for row_indices, batch in batches(range(count)):
                hidden = buffer.read(len(model.layers), row_indices)
                yield batch, model.logits(hidden, batch)
    finally:
        buffer.remove()


def streamed_perplexity(
    model: LayerwiseModel,
    rows: Rows,
    *,
    batch_size: int,
    max_rows: int | None = None,
    folder: Path | None = None,
    name: str = "the model",
) -> PerplexityResult:
    """What `perplexity` gives for the whole model: the loss in fp32, summed in fp64.

    Args:
        name: what errors and the progress call the model.

    Raises:
        DivergedError: the loss is NaN or infinite.
        UserError: there is no token to predict, or see `streamed_logits`.
    """
    loss, tokens = 0.0, 0
    options: dict[str, Any] = {"batch_size": batch_size, "max_rows": max_rows, "folder": folder}
    for batch, logits in streamed_logits(model, rows, label=f"perplexity of {name}, layer by layer", **options):
        targets, counted = next_token_targets(batch)
        loss += summed_cross_entropy(logits[:, :-1], targets, counted)
        tokens += int(counted.sum())
    if tokens == 0:
        raise UserError(f"{len(rows)} rows of {rows.sequence_length} tokens hold no token to predict")
    if not math.isfinite(loss):
        raise DivergedError(f"the loss of {name} is {loss}; it has diverged: use `compute.precision: float32`")
    return PerplexityResult.from_sum(loss, tokens)

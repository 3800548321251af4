"""Stage 1, attention transfer: every layer's maps learn to copy its own softmax attention (arXiv 2410.10254, 3.2).

One frozen forward pass carries the teacher's outputs from layer to layer (teacher forcing). At each linearized layer
the student's output is computed from the same q, k, v, its error is taken back into that layer's maps at once, and
nothing is kept: memory does not grow with depth.

# B batch, T tokens, S keys, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import TransferParams
from lolcats_core.compute import distributed
from lolcats_core.model.branches import window_dropout
from lolcats_core.model.families import takes_images
from lolcats_core.model.forward_context import HybridContext, LayerCall, LayerObserver, document_numbers
from lolcats_core.model.modeling import feature_maps, named_map_parameters
from lolcats_core.model.vision.context import grid_of
from lolcats_core.model.vision.modeling import show_images
from lolcats_core.training.calibration import KEYS, ROWS, calibrate_layer, calibration_rows
from lolcats_core.training.loop import Rows, TrainResult, batches_of, train
from lolcats_kernels.hybrid_attention import (
    HybridConfig,
    HybridWeights,
    attention_weights,
    window_scores,
)

# Queries per block of the quadratic cross-entropy term: T x T weights never exist whole.
XENT_BLOCK = 128


def layer_name(index: int) -> str:
    """The name under which a layer's error is logged."""
    return f"layer_{index:03d}"


class LossObserver:
    """Takes each layer's loss during a forward pass; with `scale`, also its gradient.

    `layers` is the number of linearized layers of the model, over which the loss is a mean.
    """

    def __init__(self, layers: int, params: TransferParams, scale: float | None) -> None:
        self.layers, self.params, self.scale = layers, params, scale
        self.total: Tensor | None = None
        self.by_layer: dict[str, Tensor] = {}

    def __call__(self, call: LayerCall) -> None:
        with torch.set_grad_enabled(self.scale is not None):
            weights, config = call.maps(call.scores)
            q, k, _, y_true = call.as_packed()
            mse = call.error(weights, config)
            loss = self.params.mse_weight * mse
            if self.params.loss_normalization == "layer":
                loss = loss / y_true.to(mse.dtype).square().mean().clamp(min=torch.finfo(mse.dtype).tiny)
            if self.params.xent_weight:
                loss = loss + self.params.xent_weight * attention_cross_entropy(q, k, weights, config)
            loss = loss / self.layers
            if self.scale is not None:
                (loss * self.scale).backward()
        self.by_layer[layer_name(call.index)] = mse.detach()
        self.total = loss.detach() if self.total is None else self.total + loss.detach()

    def scalars(self) -> dict[str, Tensor]:
        return {"loss": cast(Tensor, self.total), **self.by_layer}


def attention_cross_entropy(q: Tensor, k: Tensor, weights: HybridWeights, config: HybridConfig) -> Tensor:
    """Mean cross-entropy between softmax and student attention weights over queries and heads; quadratic, by blocks.

    Args:
        q: [B, T, H, D]; `k`: [B, T, Hk, D].
    """
    batch, tokens, heads, _ = q.shape
    keys = k.transpose(1, 2).repeat_interleave(heads // k.shape[2], 1)
    position = torch.arange(tokens, device=q.device)

    def block(start: int, q_block: Tensor) -> Tensor:
        rows = position[start : start + q_block.shape[1]]
        products = (q_block.transpose(1, 2) @ keys.mT).float()
        scores = window_scores(products, config.scale, config.softcap)
        causal = position[None, :] <= rows[:, None]
        true = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        student = attention_weights(q_block.float(), k.float(), weights, config, start)
        # Weights of keys that no branch sees are zero in both; the floor keeps 0 log 0 at 0.
        return -(true * student.clamp(min=torch.finfo(student.dtype).tiny).log()).sum()

    starts = range(0, tokens, XENT_BLOCK)
    sums = [checkpoint(block, i, q[:, i : i + XENT_BLOCK], use_reentrant=False) for i in starts]
    return torch.stack(cast(list[Tensor], sums)).sum() / (batch * heads * tokens)


def transfer_losses(
    student: PreTrainedModel, batch: dict[str, Tensor], params: TransferParams, scale: float | None = None
) -> dict[str, Tensor]:
    """Stage-1 loss of one batch: `loss` (weighted mean over layers) and each layer's mean squared error.

    Args:
        batch: input_ids [B, T] and, for packed documents, position_ids [B, T].
        scale: factor on the loss whose gradients are added to the maps' ``.grad``; None computes no gradient.
    """
    observer = LossObserver(len(feature_maps(student)), params, scale)
    run_with_observer(student, batch, observer)
    return observer.scalars()


@torch.no_grad()
def run_with_observer(student: PreTrainedModel, batch: dict[str, Tensor], observer: LayerObserver) -> None:
    """Pass a batch through the model with the teacher's outputs, each linearized layer shown to `observer`."""
    if takes_images(student.config):
        show_images(student, batch, observer)
        return
    positions = batch.get("position_ids")
    context = HybridContext.observed(observer, positions)
    decoder = cast(Any, student).base_model
    decoder(input_ids=batch["input_ids"], position_ids=positions, use_cache=False, hybrid=context)


def evaluate_transfer(
    student: PreTrainedModel, rows: Rows, params: TransferParams, device: torch.device
) -> dict[str, float]:
    """Validation losses of stage 1 over at most `max_eval_rows` rows, weighted by rows."""
    count = min(len(rows), params.max_eval_rows or len(rows))

    def losses(indices: np.ndarray) -> dict[str, Tensor]:
        batch = {name: value.to(device) for name, value in rows.batch(indices).items()}
        return transfer_losses(student, batch, params)

    return mean_losses(losses, count, params.batch_size)


def mean_losses(losses: Callable[[np.ndarray], dict[str, Tensor]], count: int, batch_size: int) -> dict[str, float]:
    """Mean of `losses` over rows 0 … count - 1, by batches, divided between the processes."""
    means = mean_values(losses, count, batch_size)
    return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))


def mean_values(measure: Callable[[np.ndarray], dict[str, Tensor]], count: int, batch_size: int) -> dict[str, Tensor]:
    """As `mean_losses`, of tensors of any shape, in float64."""
    sums: dict[str, Any] = {}
    for indices, real in distributed.rounds(batches_of(range(count), batch_size)):
        for name, value in measure(indices).items():
            sums[name] = sums.get(name, 0.0) + value.double() * (len(indices) * real)
    flat = distributed.total(torch.cat([value.flatten() for value in sums.values()])) / count
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view_as(value) for (name, value), part in zip(sums.items(), parts, strict=True)}


class HeadErrors:
    """Observer of a forward pass: each linearized head's mean squared error, and the mean square of its softmax output.

    `values`: by `layer_name`, [2, H] of a batch; `Errors` are their means over rows.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, call: LayerCall) -> None:
        y = call.attended(*call.maps(call.scores)).view_as(call.y_true)
        y_true = call.y_true.to(torch.promote_types(y.dtype, torch.float32))
        both = torch.stack([y.to(y_true.dtype) - y_true, y_true])
        self.values[layer_name(call.index)] = both.square().mean((1, 2, 4))


# By layer: "error" (mean squared error) and "power" (mean square of the softmax output) of each linearized query head.
Errors = dict[int, dict[str, list[float]]]


def errors_of(means: dict[str, Tensor]) -> Errors:
    """Means of `HeadErrors.values` as plain numbers."""
    rows = {int(name.rpartition("_")[2]): value.tolist() for name, value in means.items()}
    return {layer: {"error": error, "power": power} for layer, (error, power) in sorted(rows.items())}


def head_errors(student: PreTrainedModel, rows: Rows, count: int, batch_size: int) -> Errors:
    """Transfer errors of every linearized head over the first `count` rows, under teacher forcing.

    Args:
        student: after attention transfer, before LoRA, so that its projections are the teacher's.
    """
    device = student.device

    def measure(indices: np.ndarray) -> dict[str, Tensor]:
        observer = HeadErrors()
        run_with_observer(student, {name: value.to(device) for name, value in rows.batch(indices).items()}, observer)
        return observer.values

    return errors_of(mean_values(measure, min(count, len(rows)), batch_size))


def calibrate(student: PreTrainedModel, rows: Rows, params: TransferParams, seed: int) -> None:
    """Set every layer's maps and factors in one pass of a few training rows (`calibration`)."""
    count = math.ceil(KEYS / rows.sequence_length) if takes_images(student.config) else ROWS
    batch = rows.batch(calibration_rows(len(rows), params, seed, count))
    on_device = {name: value.to(student.device) for name, value in batch.items()}
    run_with_observer(student, on_device, functools.partial(calibrate_layer, seed=seed))


def holds_documents(rows: Rows, at_once: int = 1024) -> bool:
    """Whether any row holds several documents: positions start again inside it."""
    if "position_ids" not in rows.batch(np.arange(1)):
        return False
    batches = batches_of(range(len(rows)), at_once)
    return any(document_numbers(rows.batch(batch)["position_ids"]) is not None for batch in batches)


def longest_document(rows: Rows, enough: int, at_once: int = 1024) -> int:
    """Tokens of the longest document of any row, or of the first one seen that has more than `enough`.

    What fills a row up behind its documents holds no target and is none.
    """
    if "position_ids" not in rows.batch(np.arange(1)):
        return rows.sequence_length
    longest = 0
    for indices in batches_of(range(len(rows)), at_once):
        batch = rows.batch(indices)
        numbers = document_numbers(batch["position_ids"])
        if numbers is None:
            return rows.sequence_length
        apart = numbers + numbers.shape[1] * torch.arange(len(numbers))[:, None]
        _, which, counts = torch.unique_consecutive(apart.flatten(), return_inverse=True, return_counts=True)
        if "loss_mask" in batch:
            counts *= torch.zeros_like(counts).index_add_(0, which, batch["loss_mask"].flatten().long()) > 0
        longest = max(longest, int(counts.max()))
        if longest > enough:
            break
    return longest


def check_window(rows: Rows, settings: LinearizeConfig) -> None:
    """Refuse training rows of which the window sees everything: a student would be perfect and not linear.

    Raises:
        UserError: the rows, or all documents in them, are too short.
    """
    if len(rows) == 0:
        return
    settings.check_length("`data.sequence_length`", rows.sequence_length)
    name = "the longest document (with `data.packing: documents`)"
    settings.check_length(name, longest_document(rows, settings.window_reach))


def check_cross_entropy(rows: Rows, params: TransferParams) -> None:
    """Refuse the quadratic term on packed documents.

    Raises:
        UserError: both are asked for.
    """
    if params.xent_weight and holds_documents(rows):
        raise UserError(
            f"`transfer.xent_weight` must be 0 with `data.packing: documents` (the term has no document mask),"
            f" got {params.xent_weight}"
        )


def check_images(student: PreTrainedModel, rows: Rows, params: TransferParams) -> None:
    """Refuse images of which a tile sees everything, and the quadratic term.

    Raises:
        UserError: naming the setting and its value.
    """
    if params.xent_weight:
        raise UserError(f"`transfer.xent_weight` must be 0 for images, got {params.xent_weight}")
    settings: dict[str, Any] = cast(Any, student.config).linearize
    if settings["window"] != "tiled" or len(rows) == 0:
        return
    grid = grid_of(student.config, rows.batch(np.arange(len(rows) if "spatial_shapes" in rows.batch([0]) else 1)))
    longest = int(grid.sizes(torch.device("cpu")).max())
    if longest <= settings["window_size"]:
        raise UserError(
            f"images must be longer than the {settings['window_size']} patches of a tile (`linearize.window_size`) on"
            f" one side, else nothing would be linear; the longest side has {longest}"
        )


def attention_transfer(
    student: PreTrainedModel,
    rows: Rows,
    validation: Rows,
    params: TransferParams,
    *,
    scratch: Path,
    seed: int = 0,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> TrainResult:
    """Train the feature maps and window factors of `student` in place; the best by validation loss stay.

    Args:
        student: of `linearize`; only its maps change.
        rows, validation: token rows (`lolcats_core.data.TokenRows`), or of a vision transformer `image_rows`.
        scratch: directory of the step checkpoint; the same directory continues a killed run.

    Raises:
        UserError: nothing to train, rows, documents or images that the window sees whole, packed documents or images
            with `xent_weight`, or a loss that is not finite.
    """
    if takes_images(student.config):
        check_images(student, rows, params)
    else:
        check_cross_entropy(rows, params)
        if named_map_parameters(student):
            check_window(rows, LinearizeConfig.from_dict(cast(Any, student.config).linearize))
    student.eval()
    device = student.device
    if student.config.linearize["feature_map_init"] == "calibrated" and len(rows):
        calibrate(student, rows, params, seed)

    def step(batch: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        with window_dropout(student, params.window_dropout):
            return transfer_losses(student, batch, params, scale)

    return train(
        trainable=named_map_parameters(student),
        step=step,
        rows=rows,
        params=params,
        evaluate=lambda: evaluate_transfer(student, validation, params, device),
        scratch=scratch,
        seed=seed,
        device=device,
        log=log,
        label="attention transfer",
    )

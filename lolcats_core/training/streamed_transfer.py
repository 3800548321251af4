"""Stage 1 of a model that does not fit: layer after layer, each trained for all its epochs before the next is read.

The layers' maps are independent given the teacher's hidden states, so one layer's weights and one buffer of hidden
states are all that is needed (the published way stores every block's inputs). Training needs only the attention of a
layer; its whole forward pass runs once, when the buffer moves on.

Differences to the joint mode: the gradient norm is clipped, the rate lowered and the best step chosen for each layer
by itself. With a constant or cosine schedule, no clipping and the last step as the best, the maps are the same to
rounding.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_file
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import TransferParams
from lolcats_core.compute import distributed
from lolcats_core.model.branches import window_dropout
from lolcats_core.model.forward_context import LayerCall, LayerObserver, ignore_layer
from lolcats_core.model.modeling import feature_maps
from lolcats_core.streaming.buffer import BLOCK, HiddenBuffer
from lolcats_core.streaming.layerwise import LayerwiseModel, StopForward
from lolcats_core.streaming.stopwatch import Stopwatch
from lolcats_core.training.attention_transfer import (
    Errors,
    HeadErrors,
    LossObserver,
    check_cross_entropy,
    check_window,
    errors_of,
    mean_losses,
    mean_values,
)
from lolcats_core.training.calibration import calibrate_layer, calibration_rows
from lolcats_core.training.hidden_rows import Calibration, HiddenRows
from lolcats_core.training.loop import Rows, TrainResult, log_history, read_checkpoint, train

logger = logging.getLogger(__name__)


class StreamedTransfer:
    """Stage 1 by layers; see `streamed_attention_transfer`."""

    def __init__(
        self,
        student: LayerwiseModel,
        calibration: Calibration,
        params: TransferParams,
        *,
        scratch: Path,
        seed: int,
        log: Callable[[dict[str, float], int], None],
        stopwatch: Stopwatch,
        block_bytes: int = BLOCK,
    ) -> None:
        self.student, self.calibration, self.params = student, calibration, params
        self.scratch, self.seed, self.log, self.stopwatch = scratch, seed, log, stopwatch
        self.maps = {index: maps for index, layer in enumerate(student.layers) for maps in feature_maps(layer).values()}
        self.names = {maps: name for name, maps in feature_maps(student.model).items()}
        self.generator = torch.Generator().manual_seed(seed)
        config = cast(Any, student.model.config)
        self.make_buffer = lambda writer: HiddenBuffer(
            len(calibration),
            calibration.rows.sequence_length,
            config.hidden_size,
            student.dtype,
            params.batch_size,
            folder=scratch if params.buffer == "disk" else None,
            device=student.device,
            writer=writer,
            block_bytes=block_bytes,
        )

    def run(self) -> None:
        """Train every layer that is not trained yet."""
        if distributed.is_main():
            self.buffer = self.make_buffer(True)
        distributed.barrier()
        if not distributed.is_main():
            self.buffer = self.make_buffer(False)
            self.buffer.layer, self.buffer.done = -1, -1
        self.buffer.layer, self.buffer.done = distributed.broadcast((self.buffer.layer, self.buffer.done))
        if self.buffer.layer == 0 and not self.buffer.complete:
            with self.stopwatch.part("embedding"), self.student.end("embedding"):
                self._advance(0, self.student.embed)
        last = max(self.maps)
        for index in range(last + 1):
            moved_on = self.buffer.layer > index + 1 or (self.buffer.layer == index + 1 and self.buffer.complete)
            initial = self._initial(index)
            if index in self.maps and self._done(index) and distributed.is_main():
                log_history(self._saved(index)[1], self._log_layer)
            if self._done(index) and (moved_on or index == last):
                continue
            begun = dict(self.stopwatch.seconds)
            with ExitStack() as stack:
                with self.stopwatch.part("reading weights"):
                    layer = stack.enter_context(self.student.layer(index))
                if not self._done(index):
                    if self.buffer.layer != index:
                        raise UserError(f"{self._file(index)} is gone; delete {self.scratch} to start stage 1 again")
                    with self.stopwatch.part("training"):
                        self._train(index, layer, initial)
                if index < last:
                    with self.stopwatch.part("propagation"):
                        self._propagate(index)
            logger.info("layer %d took %s", index, self.stopwatch.since(begun))

    def _initial(self, index: int) -> dict[str, Tensor]:
        """Initial maps of a layer, the draws of `linearize`, which come in the order of the layers."""
        if index not in self.maps:
            return {}
        maps = self.maps[index].to_empty(device="cpu")
        maps.reset_parameters(self.generator)
        values = {name: p.detach().clone() for name, p in maps.named_parameters()}
        maps.to("meta")
        return values

    def _file(self, index: int) -> Path:
        return self.scratch / f"layer_{index:03d}.pt"

    def _saved(self, index: int) -> tuple[dict[str, Tensor], TrainResult, Errors]:
        """Maps, training and errors of a layer that is done.

        Raises:
            UserError: its file is damaged.
        """
        saved = read_checkpoint(self._file(index), f"delete {self.scratch} to start stage 1 again")
        return saved["maps"], TrainResult(**saved["result"]), saved["errors"]

    def _log_layer(self, metrics: dict[str, float], step: int) -> None:
        """Of one layer's metrics those that its name tells apart; the others would overwrite each other."""
        self.log({name: value for name, value in metrics.items() if "layer_" in name}, step)

    def _done(self, index: int) -> bool:
        return index not in self.maps or distributed.broadcast(self._file(index).is_file())

    def _train(self, index: int, layer: nn.Module, initial: dict[str, Tensor]) -> None:
        maps, student, params = self.maps[index], self.student, self.params
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        for name, value in initial.items():
            maps._parameters[name] = nn.Parameter(value.to(student.device, wide))
        rows = HiddenRows(self.calibration, self.buffer, index)

        def show(batch: dict[str, Tensor], observer: LayerObserver) -> None:
            def observe(call: LayerCall) -> None:
                observer(call)
                raise StopForward

            student.forward_layer(index, batch["hidden"], batch, observe)

        def losses(batch: dict[str, Tensor], scale: float | None = None) -> dict[str, Tensor]:
            observer = LossObserver(len(self.maps), params, scale)
            with window_dropout(maps, 0.0 if scale is None else params.window_dropout):
                show(batch, observer)
            return observer.scalars()

        def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(student.device, non_blocking=True) for name, value in batch.items()}

        def held_out_errors(indices: np.ndarray) -> dict[str, Tensor]:
            observer = HeadErrors()
            show(on_device(rows.held_out(indices)), observer)
            return observer.values

        def evaluate() -> dict[str, float]:
            with self.stopwatch.part("validation"):
                return mean_losses(lambda i: losses(on_device(rows.held_out(i))), validation, params.batch_size)

        validation = self.calibration.validation
        if maps.settings.feature_map_init == "calibrated":
            first = rows.batch(calibration_rows(len(rows), params, self.seed))
            show(on_device(first), functools.partial(calibrate_layer, seed=self.seed))

        own_scratch = self.scratch / f"layer_{index:03d}"
        result = train(
            trainable=dict(maps.named_parameters()),
            step=losses,
            rows=rows,
            params=params,
            evaluate=evaluate,
            scratch=own_scratch,
            seed=self.seed,
            device=student.device,
            log=self._log_layer,
            label=f"attention transfer, layer {index} (of {len(student.layers)})",
        )
        with self.stopwatch.part("validation"):
            errors = errors_of(mean_values(held_out_errors, validation, params.batch_size))
        if distributed.is_main():
            tensors = {name: p.detach().cpu().contiguous() for name, p in maps.named_parameters()}
            with atomic_file(self._file(index)) as partial:
                torch.save({"maps": tensors, "result": vars(result), "errors": errors}, partial)
            shutil.rmtree(own_scratch, ignore_errors=True)
        distributed.barrier()

    def _propagate(self, index: int) -> None:
        """Overwrite the inputs of layer `index` with those of the next."""
        self._advance(index + 1, lambda batch: self.student.forward_layer(index, batch["hidden"], batch, ignore_layer))

    def _advance(self, target: int, compute: Callable[[dict[str, Tensor]], Tensor | None]) -> None:
        buffer, device = self.buffer, self.student.device
        blocks = buffer.next_block(target)
        groups = [self.calibration.groups(buffer.block_rows(block), self.params.batch_size) for block in blocks]
        parts = [[mine for mine, share in map(distributed.part, batches) if share] for batches in groups]
        following = iter([mine for batches in parts for mine in batches][1:])
        for block, batches in zip(blocks, parts, strict=True):
            for mine in batches:
                if target:
                    batch = {**self.calibration.positions(mine), "hidden": buffer.read(target - 1, mine)}
                    # Inputs of the block after this one stay where they are until that one is written.
                    after = next(following, None)
                    if after is not None:
                        buffer.expect(target - 1, after)
                else:
                    batch = self.calibration.batch(mine)
                out = compute({name: value.to(device, non_blocking=True) for name, value in batch.items()})
                buffer.write(target, mine, cast(Tensor, out))
            buffer.flush()
            distributed.barrier()
            buffer.commit(target, block)
            distributed.barrier()

    def collect(self) -> tuple[dict[str, Tensor], TrainResult, Errors]:
        """Every layer's maps by their names in the model, the run as the joint mode would tell it, and the errors."""
        tensors: dict[str, Tensor] = {}
        results, errors = [], Errors()
        for index, maps in self.maps.items():
            trained, result, measured = self._saved(index)
            tensors |= {f"{self.names[maps]}.{name}": value for name, value in trained.items()}
            results.append(result)
            errors |= measured
        return tensors, _merged(results), errors


def _merged(results: list[TrainResult]) -> TrainResult:
    """The layers' runs as one: losses (each a share of the mean over layers) add up at equal steps."""
    entries: dict[tuple[float, bool], dict[str, float]] = {}
    for result in results:
        for entry in result.history:
            key = (entry["step"], "train_loss" not in entry)
            merged = entries.setdefault(key, {"step": entry["step"]})
            for name, value in entry.items():
                if name.endswith("loss"):
                    merged[name] = merged.get(name, 0.0) + value
                elif "layer_" in name or name == "lr":
                    merged[name] = value
    history = [entries[key] for key in sorted(entries)]
    return TrainResult(
        steps=max(result.steps for result in results),
        tokens=max(result.tokens for result in results),
        seconds=sum(result.seconds for result in results),
        best_loss=sum(result.best_loss for result in results),
        best_step=max(result.best_step for result in results),
        history=history,
    )


def streamed_attention_transfer(
    student: LayerwiseModel,
    rows: Rows,
    validation: Rows,
    params: TransferParams,
    *,
    scratch: Path,
    seed: int = 0,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    stopwatch: Stopwatch | None = None,
    block_bytes: int = BLOCK,
) -> tuple[dict[str, Tensor], TrainResult, Errors]:
    """Stage 1 with one layer of the teacher in memory at a time; `student` is closed at the end.

    Args:
        student: a linearized model; its feature maps start as `linearize` makes them with `seed`.
        params: with `buffer: disk` a killed run finds the hidden states again; from memory they are computed again up
            to the layer that was being trained.
        scratch: directory of finished layers, the step checkpoint and the buffer; the same one continues a killed run.
        stopwatch: takes the seconds of each part of the work.

    Returns:
        Every feature map by its name in the student, on the CPU, what the run did, and what `head_errors` of the joint
        mode measures.

    Raises:
        UserError: nothing is to be trained, the window sees all of every row, the teacher's files are damaged, the
            buffer does not fit on the disk, or several processes were to share one in memory.
    """
    with closing(student):
        check_cross_entropy(rows, params)
        if distributed.world() > 1 and params.buffer != "disk":
            raise UserError("`transfer.buffer` must be disk with several processes, which share its file, got memory")
        if not feature_maps(student.model):
            raise UserError("attention transfer: nothing to train; every layer keeps its softmax attention")
        if len(rows) == 0:
            raise UserError("attention transfer: there are no training rows")
        check_window(rows, LinearizeConfig.from_dict(cast(Any, student.model.config).linearize))
        work = StreamedTransfer(
            student,
            Calibration.plan(rows, validation, params, seed),
            params,
            scratch=scratch,
            seed=seed,
            log=log,
            stopwatch=stopwatch or Stopwatch(student.device),
            block_bytes=block_bytes,
        )
        work.run()
        distributed.barrier()
        return work.collect()

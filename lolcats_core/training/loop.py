"""The training loop that both stages and the teacher's pretraining share.

Order of the rows, optimiser, learning-rate schedule, clipping, accumulation, validation, best weights and
step checkpoints live here. A run that was killed continues from its last checkpoint and ends in the same weights
as an undisturbed one: bitwise on a CPU with the same number of threads. Of several processes (`parallel`) each takes
its part of every micro-batch, so the order of the rows does not depend on their number, and neither does a checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lolcats_common.errors import DivergedError, UserError
from lolcats_common.files import atomic_file
from lolcats_common.progress import progress
from lolcats_common.training_params import TrainingParams
from lolcats_core.compute import distributed

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"


class Rows(Protocol):
    """Token rows of one length, read by index."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]: ...


@dataclass
class TrainResult:
    """What a training run did. `history` holds one mapping per logged step and per evaluation."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def total_steps(rows: int, params: TrainingParams) -> int:
    """Optimiser steps of a run over `rows` rows; the last, smaller step of an epoch counts."""
    per_epoch = math.ceil(rows / (params.batch_size * params.gradient_accumulation))
    planned = per_epoch * params.epochs
    return planned if params.max_steps is None else min(planned, params.max_steps)


def step_batches(rows: int, params: TrainingParams, seed: int, step: int) -> list[np.ndarray]:
    """Row indices of each micro-batch of optimiser step `step` (from 0), a function of its arguments alone."""
    per_step = params.batch_size * params.gradient_accumulation
    epoch, position = divmod(step, math.ceil(rows / per_step))
    chosen = _order(rows, seed, epoch)[position * per_step : (position + 1) * per_step].copy()
    return [chosen[i : i + params.batch_size] for i in range(0, len(chosen), params.batch_size)]


def batches_of(rows: range, size: int) -> list[np.ndarray]:
    """`rows` in order, in batches of at most `size`: the rows of a pass that does not shuffle."""
    return [np.arange(start, min(start + size, rows.stop)) for start in rows[::size]]


@lru_cache(maxsize=1)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order; kept, since every step asks for it."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def learning_rate_scale(params: TrainingParams, step: int, steps: int) -> float:
    """Factor on `lr` at `step` from warm-up and the cosine; reduce-on-plateau acts on top of it."""
    if step < params.warmup_steps:
        return (step + 1) / params.warmup_steps
    if params.schedule != "cosine":
        return 1.0
    share = (step - params.warmup_steps) / max(1, steps - params.warmup_steps)
    floor = min(1.0, params.min_lr / params.lr)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def _silent(metrics: dict[str, float], step: int) -> None:
    """Only rank 0 logs."""


class _Plateau:
    """Reduce-on-plateau, mode min, relative threshold 1e-4 (torch's default), stepped at every evaluation."""

    def __init__(self, params: TrainingParams) -> None:
        self.params, self.factor, self.best, self.bad = params, 1.0, math.inf, 0

    def step(self, loss: float) -> None:
        if loss < self.best * (1 - 1e-4):
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad > self.params.plateau_patience:
            self.factor, self.bad = self.factor * self.params.plateau_factor, 0

    def lr(self, lr: float) -> float:
        return max(lr * self.factor, min(lr, self.params.min_lr))


def _adamw(params: TrainingParams) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.AdamW(tensors, lr=params.lr, weight_decay=params.weight_decay)


class _Run:
    """The state of one run, and its way to disk and back."""

    def __init__(self, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, params: TrainingParams):
        self.trainable, self.optimizer = trainable, optimizer
        self.plateau, self.result = _Plateau(params), TrainResult()
        self.best: dict[str, Tensor] = {}
        self.window: list[dict[str, Tensor]] = []  # scalars of each micro-batch since the last logged step

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.trainable.items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.trainable.items():
            tensor.copy_(weights[name])

    def save(self, path: Path, fingerprint: str) -> None:
        if distributed.world() > 1:
            # The checkpoint holds the sums of all processes, and from here on rank 0 does.
            for entry in self.window:
                for value in entry.values():
                    distributed.total(value)
                    value.mul_(float(distributed.is_main()))
        if not distributed.is_main():
            return
        state = {
            "fingerprint": fingerprint,
            "weights": self.snapshot(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "plateau": {"factor": self.plateau.factor, "best": self.plateau.best, "bad": self.plateau.bad},
            "window": [{name: value.cpu() for name, value in entry.items()} for entry in self.window],
            "result": vars(self.result),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with atomic_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path, fingerprint: str) -> None:
        state = read_checkpoint(path, "delete it to start this stage again")
        if not isinstance(state, dict) or state.get("fingerprint") != fingerprint:
            raise UserError(f"{path}: the checkpoint is of another run; delete it to start this stage again")
        self.restore(state["weights"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.plateau).update(state["plateau"])
        device = next(iter(self.trainable.values())).device
        own = float(distributed.is_main())
        self.window = [{name: value.to(device) * own for name, value in entry.items()} for entry in state["window"]]
        self.result = TrainResult(**state["result"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def read_checkpoint(path: Path, remedy: str) -> Any:
    """What `torch.save` wrote, every part held against its checksum, which `torch.load` itself does not look at.

    Raises:
        UserError: it is damaged; `remedy` says what to do.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: the checkpoint is damaged ({type(error).__name__}); {remedy}") from None


def train(
    *,
    trainable: dict[str, nn.Parameter],
    step: Callable[[dict[str, Tensor], float], dict[str, Tensor]],
    rows: Rows,
    params: TrainingParams,
    evaluate: Callable[[], dict[str, float]],
    scratch: Path,
    seed: int,
    device: torch.device,
    log: Callable[[dict[str, float], int], None],
    label: str,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    weigh: Callable[[np.ndarray], float] = len,
) -> TrainResult:
    """Train `trainable` and leave the weights of the lowest validation loss in it.

    Args:
        trainable: parameters by a name that stays the same between runs.
        step: given a micro-batch on `device` and the factor on its loss, runs forward and backward (adding to
            ``.grad``) and returns detached scalar tensors, ``loss`` among them.
        rows: training rows; their order depends on `seed` and the step alone.
        evaluate: validation metrics, ``loss`` among them; called before the first step, every `eval_every` and at
            the end.
        scratch: directory of the step checkpoint.
        log: receives metrics and the optimiser step; a run that continues begins with those of the steps that it has,
            since what the killed one had not sent yet is lost.
        make_optimizer: AdamW with `lr` and `weight_decay` unless given; its learning rates are scheduled.
        weigh: what rows count for in the mean that ``loss`` is, so that a step's loss is the same mean over all its
            rows however micro-batches and processes divide them.

    Raises:
        DivergedError: the loss is not finite.
        UserError: no row to train on, or the checkpoint is damaged.
    """
    if len(rows) == 0:
        raise UserError(f"{label}: there are no training rows")
    if not trainable:
        raise UserError(f"{label}: nothing to train; every layer keeps its softmax attention")
    if not distributed.is_main():
        log = _silent
    steps = total_steps(len(rows), params)
    tensors = list(trainable.values())
    run = _Run(trainable, (make_optimizer or _adamw(params))(tensors), params)
    base_lrs = [group["lr"] for group in run.optimizer.param_groups]
    fingerprint = f"{seed}/{len(rows)}x{rows.sequence_length}/{sum(t.numel() for t in tensors)}/{params}"
    checkpoint = scratch / CHECKPOINT
    if checkpoint.exists():
        run.load(checkpoint, fingerprint)
        logger.info("%s: continuing from step %d of %d", label, run.result.steps, steps)
        log_history(run.result, log)
    else:
        _validate(run, evaluate, log)
    started = time.monotonic() - run.result.seconds
    window_start = (run.result.tokens, run.result.seconds)

    with progress(steps, label, initial=run.result.steps) as shown:
        while run.result.steps < steps:
            scale = learning_rate_scale(params, run.result.steps, steps)
            for group, base in zip(run.optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = run.plateau.lr(base * scale)
            batches = step_batches(len(rows), params, seed, run.result.steps)
            weights = [weigh(indices) for indices in batches]
            for indices, weight in zip(batches, weights, strict=True):
                mine, part = distributed.part(indices, weigh)
                batch = {name: value.to(device, non_blocking=True) for name, value in rows.batch(mine).items()}
                share = part * weight / (sum(weights) or 1.0)
                run.window.append({name: value * share for name, value in step(batch, share).items()})
            distributed.sum_gradients(tensors)
            norm = torch.nn.utils.clip_grad_norm_(tensors, params.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.result.steps += 1
            run.result.tokens += sum(map(len, batches)) * rows.sequence_length
            run.result.seconds = time.monotonic() - started

            last = run.result.steps == steps
            if run.result.steps % params.log_every == 0 or last:
                metrics = _mean(run.window, params.log_every, label, run.result.steps)
                tokens, seconds = run.result.tokens - window_start[0], run.result.seconds - window_start[1]
                metrics |= {
                    "lr": run.optimizer.param_groups[0]["lr"],
                    "grad_norm": float(norm),
                    "tokens_per_second": tokens / max(seconds, 1e-9),
                }
                run.result.history.append({"step": run.result.steps, **metrics})
                log(metrics, run.result.steps)
                shown.update(0, loss=metrics["train_loss"], best=run.result.best_loss)
                run.window, window_start = [], (run.result.tokens, run.result.seconds)
            if run.result.steps % params.eval_every == 0 or last:
                _validate(run, evaluate, log)
            shown.update(1)
            if run.result.steps % params.checkpoint_every == 0 and not last:
                run.save(checkpoint, fingerprint)
    run.result.seconds = time.monotonic() - started
    run.save(checkpoint, fingerprint)
    run.restore(run.best)
    return run.result


def log_history(result: TrainResult, log: Callable[[dict[str, float], int], None]) -> None:
    """Log every entry of a run's history at its step."""
    for entry in result.history:
        log({name: value for name, value in entry.items() if name != "step"}, int(entry["step"]))


def _mean(window: list[dict[str, Tensor]], steps: int, label: str, step: int) -> dict[str, float]:
    """Average of the logged scalars over the optimiser steps of the window, read from the device once."""
    steps = min(steps, (step - 1) % steps + 1)
    sums = {name: torch.stack([entry[name].float() for entry in window]).sum() / steps for name in window[0]}
    values = dict(zip(sums, distributed.total(torch.stack(list(sums.values()))).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        raise DivergedError(f"{label}: the loss is {values['loss']} at step {step}; lower the learning rate `lr`")
    return {f"train_{name}": value for name, value in values.items()}


def _validate(
    run: _Run, evaluate: Callable[[], dict[str, float]], log: Callable[[dict[str, float], int], None]
) -> None:
    values = evaluate()
    metrics = {f"validation_{name}": value for name, value in values.items()}
    run.result.history.append({"step": run.result.steps, **metrics})
    log(metrics, run.result.steps)
    run.plateau.step(values["loss"])
    if values["loss"] < run.result.best_loss:
        run.result.best_loss, run.result.best_step = values["loss"], run.result.steps
        run.best = run.snapshot()

"""Several processes on one piece of work, as `torchrun` starts them: who does what, and sums over all of them.

What is trained is small and lies whole in every process, so a sum of gradients keeps them equal, rank 0 alone writes
checkpoints, and a checkpoint fits any number of processes. With one process every function is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lolcats_common.errors import UserError

T = TypeVar("T")


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process writes and logs."""
    return rank() == 0


def start(device: torch.device) -> torch.device:
    """Join the other processes if there are any; the device of this one.

    On CUDA each process of a host takes the GPU of its `LOCAL_RANK`; elsewhere they talk through gloo.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > there:
            raise UserError(f"`compute.processes` must be at most the {there} CUDA devices of this machine, got {here}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # NCCL is told its GPU: a barrier would otherwise have to guess it.
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device


def torchrun(processes: int) -> list[str]:
    """Arguments for Python that run what follows (`-m module …`) in `processes` processes of this host."""
    # The loopback address: a host's own name need not resolve.
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    return ["-m", "torch.distributed.run", *here]


def threads(processes: int) -> dict[str, str]:
    """The environment's share of the cores for each of `processes`; torchrun would give each one core."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}


def finish() -> None:
    """Leave the group, when everyone is done."""
    if world() > 1:
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's `value` (anything that pickles) in every process."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def part(indices: np.ndarray, weigh: Callable[[np.ndarray], float] = len) -> tuple[np.ndarray, float]:
    """This process's rows of a micro-batch, and its share of the micro-batch's weight.

    A process for which nothing is left gets the first row with share 0, since all must take part in every pass.
    """
    if world() == 1:
        return indices, 1.0
    mine = np.array_split(indices, world())[rank()]
    if len(mine) == 0:
        return indices[:1], 0.0
    whole = weigh(indices)
    return mine, weigh(mine) / whole if whole else 0.0


def rounds(items: Sequence[T]) -> Iterator[tuple[T, float]]:
    """This process's items and 1; where another has one more, an item again with 0."""
    for start in range(0, len(items), world()):
        mine = start + rank()
        yield (items[mine], 1.0) if mine < len(items) else (items[start], 0.0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, one message per dtype."""
    if world() == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        grads = [p.grad for p in group if p.grad is not None]
        flat = total(torch.cat([grad.flatten() for grad in grads]))
        for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))

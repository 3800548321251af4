"""Rows of the machine's memory on their way to a GPU and back, beside the work of both.

Copies run on streams of their own: the GPU's work waits for them by events, and the host only for what is two batches
behind. Rows that the GPU cannot reach pass through page-locked memory that is allocated once. On a CPU the same calls
bring rows together on a thread and copy them.

# R rows of memory, n rows of a batch
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Batches under way in each direction.
DEPTH = 2


def worker(name: str, device: torch.device) -> ThreadPoolExecutor:
    """One thread, with `device` as its own: a thread begins with the first GPU, which may be another process's."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (index,))


class _Slot:
    """Room for a batch on the device and, where rows go through it, in page-locked memory.

    `copied`: the rows have arrived, so that the page-locked memory is free.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.staged: Tensor | None = None
        self.copied = torch.cuda.Event(blocking=True)

    def place(self, like: Tensor, count: int, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
        if self.rows is None or len(self.rows) < count:
            self.rows = torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=device)
            self.rows.record_stream(stream)
        return self.rows[:count]

    def stage(self, like: Tensor, count: int) -> Tensor:
        if self.staged is None or len(self.staged) < count:
            self.staged = torch.empty((count, *like.shape[1:]), dtype=like.dtype, pin_memory=True)
        return self.staged[:count]


class Reader:
    """Rows of `source` [R, ...] on `device`, begun before they are needed.

    Args:
        locked: whether the device reaches `source` itself.
    """

    def __init__(self, source: Tensor, device: torch.device, *, locked: bool) -> None:
        self.source, self.device, self.locked = source, device, locked
        self._thread = worker("hidden-in", device)
        self._slots: deque[_Slot] = deque()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._slots.extend(_Slot() for _ in range(DEPTH))

    def start(self, row_indices: np.ndarray) -> Callable[[], Tensor]:
        """Begin to bring rows `row_indices`; what is returned waits for them and gives them, [n, ...].

        On a GPU their memory is taken again by the second `start` after this one, behind all work that the current
        stream has by then.
        """
        if self.device.type != "cuda":
            return self._thread.submit(torch.index_select, self.source, 0, torch.from_numpy(row_indices)).result
        slot = self._slots[0]
        self._slots.rotate(-1)
        rows = slot.place(self.source, len(row_indices), self.device, self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        gathered: Future[None] | None = None
        if self.locked:
            self._copy_each(rows, row_indices.tolist(), slot)
        else:
            gathered = self._thread.submit(self._gather, rows, torch.from_numpy(row_indices), slot)

        def finish() -> Tensor:
            if gathered is not None:
                gathered.result()
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
            return rows

        return finish

    def _copy_each(self, rows: Tensor, row_indices: Sequence[int], slot: _Slot) -> None:
        with torch.cuda.stream(self._stream):
            for row, index in zip(rows.unbind(), row_indices, strict=True):
                row.copy_(self.source[index], non_blocking=True)
            slot.copied.record()

    def _gather(self, rows: Tensor, index: Tensor, slot: _Slot) -> None:
        slot.copied.synchronize()
        staged = slot.stage(self.source, len(rows))
        torch.index_select(self.source, 0, index, out=staged)
        with torch.cuda.stream(self._stream):
            rows.copy_(staged, non_blocking=True)
            slot.copied.record()


class Writer:
    """Batches of `device` into rows of memory.

    Args:
        locked: whether the device reaches those rows itself.
    """

    def __init__(self, device: torch.device, *, locked: bool) -> None:
        self.device, self.locked = device, locked
        self._thread = worker("hidden-out", device)
        # What is under way is kept on the device until it has arrived.
        self._pending: deque[tuple[Future[None], Tensor]] = deque()
        self._slots: deque[_Slot] = deque()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._slots.extend(_Slot() for _ in range(DEPTH))

    def put(self, rows: Tensor, target: Tensor) -> None:
        """Copy `rows` [n, ...] to `target`, where they are after `wait`."""
        if self.device.type != "cuda":
            target.copy_(rows)
            return
        while len(self._pending) >= DEPTH:
            self._pending.popleft()[0].result()
        slot = self._slots[0]
        self._slots.rotate(-1)
        staged = target if self.locked else slot.stage(target, len(rows))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            staged.copy_(rows, non_blocking=True)
            slot.copied.record()
        self._pending.append((self._thread.submit(_store, slot.copied, staged, target), rows))

    def wait(self) -> None:
        """Until all rows have arrived."""
        while self._pending:
            self._pending.popleft()[0].result()


def _store(copied: torch.cuda.Event, staged: Tensor, target: Tensor) -> None:
    copied.synchronize()
    if staged is not target:
        target.copy_(staged)


def page_lock(data: Tensor, owner: object) -> bool:
    """Lock memory for direct copies (torch's own pinned memory is rounded up to a power of two) while `owner` lives;
    False where the system does not allow so much."""
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    except RuntimeError:
        return False
    weakref.finalize(owner, _page_unlock, data).atexit = False
    return True


def _page_unlock(data: Tensor) -> None:
    """Before the memory is freed: the driver would take whatever comes to lie at its address for locked."""
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(data.data_ptr()))

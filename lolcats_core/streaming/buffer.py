"""The hidden states of the whole calibration set, in one buffer that each layer's outputs overwrite.

The rows lie in blocks, and there is one more slot than blocks. The outputs of a layer's block go into the free slot,
which frees the slot of that block's inputs for the next block: every layer shifts all blocks by one slot. So a write
never touches what is still to be read, and after a kill the block that was being written is computed again. Only a
counter says how far it got, and it moves when the block is written.

Rows are not forced onto the disk block by block, which would cost more time than the layers do. A file that a restart
of the machine may have left half-written is known by the machine's boot id, and counts as lost.

# n rows asked for, T tokens, d hidden size
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_common.files import REFUSALS, disk_refusals
from lolcats_core.streaming.copies import Reader, Writer, page_lock

DATA, PROGRESS = "hidden.bin", "hidden.json"
# Bytes of a block, at least one batch. After each one everything waits until it has arrived.
BLOCK = 2**30


class HiddenBuffer:
    """Rows [T, d] that stand at `layer`: they are that layer's inputs.

    Args:
        rows, tokens, width: of the calibration set.
        batch: rows per forward pass; a block holds a multiple.
        folder: where the file lies that keeps the rows through a crash; None keeps them in memory.
        device: where rows are computed; copies overlap with its work (`copies`).
        resume: continue with the rows that an earlier run left in the file.
        writer: whether this process makes the file and its counter (of several that share it, one).

    Attributes:
        layer, done: `done` blocks are inputs of `layer`, the others of the layer before.

    Raises:
        UserError: the file does not fit on the disk.
    """

    def __init__(
        self,
        rows: int,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        batch: int,
        *,
        folder: Path | None = None,
        device: torch.device | None = None,
        writer: bool = True,
        resume: bool = True,
        block_bytes: int = BLOCK,
    ) -> None:
        self.rows, self.folder, self.writer = rows, folder, writer
        self.device = device or torch.device("cpu")
        self._ahead: tuple[int, bytes, Callable[[], Tensor]] | None = None
        row_bytes = tokens * width * dtype.itemsize
        self.block = batch * min(max(1, block_bytes // (row_bytes * batch)), -(-rows // batch))
        self.blocks = -(-rows // self.block)
        shape = ((self.blocks + 1) * self.block, tokens, width)
        self.layer, self.done = 0, 0
        self._key = f"{rows}x{tokens}x{width} {dtype} by {self.block}, boot {_boot_id()}"
        if folder is None:
            self._data = torch.empty(shape, dtype=dtype)
        else:
            if writer and not resume:
                self.remove()
            if writer:
                self._make(folder, shape[0] * row_bytes)
            # The file may be larger than memory; the page cache holds as much of it as there is room for.
            raw = np.memmap(folder / DATA, dtype=np.uint8, mode="r+", shape=(shape[0] * row_bytes,))
            self._data = torch.from_numpy(raw).view(dtype).view(shape)
        # Memory is locked whole where that is allowed, so that the device copies from and to it directly.
        locked = folder is None and self.device.type == "cuda" and page_lock(self._data, self)
        self._reader = Reader(self._data, self.device, locked=locked)
        self._writer = Writer(self.device, locked=locked)

    def _make(self, folder: Path, size: int) -> None:
        """The file, as an earlier run left it or empty."""
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / DATA
        state = _read(folder / PROGRESS)
        if state.get("key") == self._key and data.is_file() and data.stat().st_size == size:
            self.layer, self.done = state["layer"], state["done"]
            return
        (folder / PROGRESS).unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"the hidden states of {self.rows} rows need {size / 2**30:.1f} GiB, but {folder} has"
                f" {free / 2**30:.1f} GiB free; free space or lower `data.max_train_tokens`"
            )
        with disk_refusals(data), data.open("wb") as file:
            file.truncate(size)
            # A disk that fills up later would end the process by SIGBUS in the middle of a layer.
            _reserve(file.fileno(), size)

    def remove(self) -> None:
        """Delete the file, if there is one."""
        for name in (DATA, PROGRESS) if self.folder is not None and self.writer else ():
            (cast(Path, self.folder) / name).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether every block stands at `layer`."""
        return self.done == self.blocks

    def block_rows(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.rows))

    def expect(self, layer: int, rows: np.ndarray) -> None:
        """Begin to bring to the device what the next `read` will ask for."""
        slots = self._slots(layer, rows)
        self._ahead = layer, slots.tobytes(), self._reader.start(slots)

    def read(self, layer: int, rows: np.ndarray) -> Tensor:
        """Inputs [n, T, d] of `layer` on the device; on a GPU they are there until the next `read`."""
        slots, (ahead, self._ahead) = self._slots(layer, rows), (self._ahead, None)
        if ahead is not None and ahead[:2] == (layer, slots.tobytes()):
            return ahead[2]()
        return self._reader.start(slots)()

    def write(self, layer: int, rows: np.ndarray, hidden: Tensor) -> None:
        """Put inputs of `layer` into the block that comes next; `commit` makes them count."""
        first = int(self._slots(layer, rows[:1])[0])
        self._writer.put(hidden, self._data[first : first + len(rows)])

    def flush(self) -> None:
        """Wait until everything that was written has arrived."""
        self._writer.wait()

    def commit(self, layer: int, block: int) -> None:
        """`block` now stands at `layer`, after `flush` in every process."""
        self.layer, self.done = layer, block + 1
        if self.folder is not None and self.writer:
            _write(self.folder / PROGRESS, {"key": self._key, "layer": layer, "done": self.done})

    def next_block(self, layer: int) -> range:
        """Blocks that do not stand at `layer` yet."""
        return range(self.done if self.layer == layer else 0, self.blocks)

    def _slots(self, layer: int, rows: np.ndarray) -> np.ndarray:
        block, within = np.divmod(np.asarray(rows, dtype=np.int64), self.block)
        return (block - layer) % (self.blocks + 1) * self.block + within


def _reserve(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:  # macOS has no such call
        pass
    except OSError as error:
        if error.errno in REFUSALS:
            raise


def _boot_id() -> str:
    """Changes when the machine starts anew; one value where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _write(path: Path, state: dict[str, Any]) -> None:
    """The counter, whole or not at all; not forced onto the disk, which would force the rows too."""
    partial = path.with_suffix(".partial")
    with disk_refusals(path):
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    """The counter; an empty mapping where there is none that can be read."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state if isinstance(state["layer"], int) and isinstance(state["done"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

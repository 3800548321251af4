"""The hidden states of the whole calibration set, in one buffer that each layer's outputs overwrite.

The rows lie in blocks, and there is one more slot than blocks. The outputs of a layer's block go into the free slot,
which frees the slot of that block's inputs for the next block: every layer shifts all blocks by one slot. So a write
never touches what is still to be read, and after a crash the block that was being written is computed again. Only a
counter says how far it got, and it moves when the block is on the disk.

# n rows asked for, T tokens, d hidden size
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lolcats_core.errors import UserError
from lolcats_core.files import fsync_path, write_json

DATA, PROGRESS = "hidden.bin", "hidden.json"
# Bytes of a block, at least one batch.
BLOCK = 256 * 2**20


class HiddenBuffer:
    """Rows [T, d] that stand at `layer`: they are that layer's inputs.

    Args:
        rows, tokens, width: of the calibration set.
        batch: rows per forward pass; a block holds a multiple.
        folder: where the file lies that keeps the rows through a crash; None keeps them in memory.
        pin: page-lock memory rows, for faster copies to a GPU.
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
        pin: bool = False,
        writer: bool = True,
        resume: bool = True,
        block_bytes: int = BLOCK,
    ) -> None:
        self.rows, self.folder, self.writer = rows, folder, writer
        row_bytes = tokens * width * dtype.itemsize
        self.block = batch * min(max(1, block_bytes // (row_bytes * batch)), -(-rows // batch))
        self.blocks = -(-rows // self.block)
        shape = ((self.blocks + 1) * self.block, tokens, width)
        self.layer, self.done = 0, 0
        self._key = f"{rows}x{tokens}x{width} {dtype} by {self.block}"
        if folder is None:
            self._data = torch.empty(shape, dtype=dtype, pin_memory=pin)
            return
        if writer and not resume:
            self.remove()
        if writer:
            self._make(folder, shape[0] * row_bytes)
        # The file may be larger than memory; the page cache holds as much of it as there is room for.
        raw = np.memmap(folder / DATA, dtype=np.uint8, mode="r+", shape=(shape[0] * row_bytes,))
        self._data = torch.from_numpy(raw).view(dtype).view(shape)

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
        with data.open("wb") as file:
            file.truncate(size)

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

    def read(self, layer: int, rows: np.ndarray, pin: bool = False) -> Tensor:
        """Inputs [n, T, d] of `layer`, a copy."""
        places = torch.from_numpy(self._places(layer, rows))
        out = torch.empty((len(rows), *self._data.shape[1:]), dtype=self._data.dtype, pin_memory=pin)
        return torch.index_select(self._data, 0, places, out=out)

    def write(self, layer: int, rows: np.ndarray, hidden: Tensor) -> None:
        """Put inputs of `layer` into the block that comes next; `commit` makes them count."""
        first = int(self._places(layer, rows[:1])[0])
        self._data[first : first + len(rows)].copy_(hidden)

    def commit(self, layer: int, block: int) -> None:
        """`block` now stands at `layer`: first the rows reach the disk, then the counter."""
        self.layer, self.done = layer, block + 1
        if self.folder is not None and self.writer:
            fsync_path(self.folder / DATA)
            write_json(self.folder / PROGRESS, {"key": self._key, "layer": layer, "done": self.done})

    def next_block(self, layer: int) -> range:
        """Blocks that do not stand at `layer` yet."""
        return range(self.done if self.layer == layer else 0, self.blocks)

    def _places(self, layer: int, rows: np.ndarray) -> np.ndarray:
        block, within = np.divmod(np.asarray(rows, dtype=np.int64), self.block)
        return (block - layer) % (self.blocks + 1) * self.block + within


def _read(path: Path) -> dict[str, Any]:
    """The counter; an empty mapping where there is none that can be read."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state if isinstance(state["layer"], int) and isinstance(state["done"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

"""The rows of streamed stage 1: which there are, which follow each other, and a layer's inputs as `train` reads them.

# B rows of a batch, T tokens, d hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from lolcats_common.params import TransferParams
from lolcats_core.compute import distributed
from lolcats_core.streaming.buffer import HiddenBuffer
from lolcats_core.training.loop import Rows, batches_of, step_batches, total_steps


@dataclass(frozen=True)
class Calibration:
    """Training and validation rows as one set: `row_indices` count through the buffer, training rows first.

    Attributes:
        train: the rows that training will see, in order. validation: how many rows follow them.
        following: by the row indices of a batch (as bytes), those of the batch that this process reads after it.
        positioned: whether batches have position_ids: rows hold several documents, or do not begin at 0.
    """

    rows: Rows
    held_out: Rows
    train: np.ndarray
    validation: int
    following: dict[bytes, np.ndarray]
    positioned: bool

    @classmethod
    def plan(cls, rows: Rows, held_out: Rows, params: TransferParams, seed: int) -> Calibration:
        steps = range(total_steps(len(rows), params))
        seen = [indices for step in steps for indices in step_batches(len(rows), params, seed, step)]
        train = np.unique(np.concatenate(seen))
        validation = min(len(held_out), params.max_eval_rows or len(held_out))
        mine = [np.searchsorted(train, distributed.part(indices)[0]) for indices in seen]
        validated = batches_of(range(validation), params.batch_size)
        measured = [len(train) + indices for indices, _ in distributed.rounds(validated)]
        following = {before.tobytes(): after for reads in (mine, measured) for before, after in pairwise(reads)}
        return cls(rows, held_out, train, validation, following, "position_ids" in rows.batch(train[:1]))

    def __len__(self) -> int:
        return len(self.train) + self.validation

    def batch(self, row_indices: np.ndarray) -> dict[str, Tensor]:
        """The tokens of rows of the buffer, all training rows or all validation rows."""
        if row_indices[0] < len(self.train):
            return self.rows.batch(self.train[row_indices])
        return self.held_out.batch(row_indices - len(self.train))

    def positions(self, row_indices: np.ndarray) -> dict[str, Tensor]:
        """position_ids [B, T] of rows that have them; nothing of one document a row, from 0 on."""
        found = self.batch(row_indices) if self.positioned else {}
        return {name: value for name, value in found.items() if name == "position_ids"}

    def groups(self, row_indices: range, size: int) -> list[np.ndarray]:
        """`row_indices` in batches of at most `size` that do not mix training and validation rows."""
        edge = len(self.train)
        start, stop = row_indices.start, row_indices.stop
        parts = (range(start, min(stop, edge)), range(max(start, edge), stop))
        return [batch for part in parts for batch in batches_of(part, size)]


class HiddenRows:
    """The training rows as `train` reads them: inputs of `layer`, hidden [B, T, d], instead of token ids.

    What follows a batch is brought to the device while the batch is worked on.
    """

    def __init__(self, calibration: Calibration, buffer: HiddenBuffer, layer: int) -> None:
        self.calibration, self.buffer, self.layer = calibration, buffer, layer
        self.sequence_length = calibration.rows.sequence_length

    def __len__(self) -> int:
        return len(self.calibration.rows)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        return self.at(np.searchsorted(self.calibration.train, np.asarray(indices)))

    def held_out(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The same of validation rows."""
        return self.at(indices + len(self.calibration.train))

    def at(self, row_indices: np.ndarray) -> dict[str, Tensor]:
        """The same of any rows of the buffer."""
        batch = {**self.calibration.positions(row_indices), "hidden": self.buffer.read(self.layer, row_indices)}
        after = self.calibration.following.get(row_indices.tobytes())
        if after is not None:
            self.buffer.expect(self.layer, after)
        return batch

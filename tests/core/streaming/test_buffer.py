"""The buffer of hidden states: rows brought together ahead are the rows that are asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lolcats_core.streaming.buffer import HiddenBuffer
from tests.core.tiny import tiny_teacher
from tests.core.training.test_streamed_transfer import streamed


def test_a_read_gives_its_own_rows_whatever_was_expected(tmp_path: Path) -> None:
    buffer = HiddenBuffer(6, 3, 4, torch.float32, 2, folder=tmp_path, block_bytes=1)
    values = torch.randn(6, 3, 4)
    for block in range(buffer.blocks):
        rows = np.asarray(buffer.block_rows(block))
        buffer.write(0, rows, values[rows])
        buffer.flush()
        buffer.commit(0, block)
    asked, other = np.array([5, 0, 3]), np.array([1, 2])
    buffer.expect(0, asked)
    assert torch.equal(buffer.read(0, asked), values[asked])
    buffer.expect(0, other)
    assert torch.equal(buffer.read(0, asked), values[asked])
    # What was expected and not asked for is forgotten: these places hold other rows by now.
    buffer.write(1, np.array([0, 1]), values[2:4])
    assert torch.equal(buffer.read(1, np.array([0, 1])), values[2:4])
    assert torch.equal(buffer.read(0, other), values[other])


def test_training_validation_and_the_pass_to_the_next_layer_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    seen: Counter[bool] = Counter()

    def watched(buffer: HiddenBuffer, layer: int, rows: np.ndarray) -> torch.Tensor:
        seen[buffer._ahead is not None and buffer._ahead[:2] == (layer, buffer._slots(layer, rows).tobytes())] += 1
        return read(buffer, layer, rows)

    read = HiddenBuffer.read
    monkeypatch.setattr(HiddenBuffer, "read", watched)
    # Layers of 12 steps and 3 times 2 batches of validation; 2 passes over 8 batches in blocks of 4.
    streamed(tmp_path / "teacher", tmp_path / "run", block_bytes=4 * 4 * 40 * 32 * 4)
    assert seen == {True: 3 * (11 + 3) + 2 * 7, False: 3 * 4 + 2}  # what starts a sequence of reads is not expected

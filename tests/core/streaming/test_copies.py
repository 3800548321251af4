"""Rows on their way to a GPU and back arrive whole, however far the host is ahead; weights wait in one place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lolcats_core.streaming.copies import Reader, Writer, page_lock
from lolcats_core.streaming.weights import Prefetcher, WeightFiles, names_in, put, without_weights
from tests.core.tiny import tiny_teacher

ROWS, WIDTH, BATCH = 24, 2**18, 4


def busy(x: torch.Tensor) -> torch.Tensor:
    """Some milliseconds of the GPU."""
    for _ in range(20):
        x = x @ x
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "staged"])
def test_rows_that_were_read_ahead_and_written_are_the_rows_that_were_asked_for(locked: bool) -> None:
    device = torch.device("cuda")
    source = torch.arange(float(ROWS))[:, None].repeat(1, WIDTH)
    target = torch.zeros_like(source)

    class Owner:
        pass

    owner = Owner()
    if locked:
        assert page_lock(source, owner)
        assert page_lock(target, owner)
    reader, writer = Reader(source, device, locked=locked), Writer(device, locked=locked)
    order = np.random.default_rng(0).permutation(ROWS).reshape(-1, BATCH)
    load = torch.eye(2048, device=device)
    coming = reader.start(order[0])
    for number in range(len(order)):
        rows = coming()
        if number + 1 < len(order):
            coming = reader.start(order[number + 1])
        load = busy(load)  # the host is ahead of all this
        writer.put(rows + load[0, 0], target[number * BATCH : (number + 1) * BATCH])
    writer.wait()
    assert torch.equal(target, source[torch.from_numpy(order.flatten())] + 1)


@pytest.mark.gpu
def test_weights_read_ahead_into_the_same_memory_do_not_touch_those_before(tmp_path: Path) -> None:
    model = tiny_teacher()
    model.save_pretrained(tmp_path)
    files, device = WeightFiles(tmp_path), torch.device("cuda")
    empty = without_weights(lambda: type(model)(model.config))
    layers = [(layer, names_in(empty, layer)) for layer in empty.model.layers]
    ahead = Prefetcher(files, device)
    ahead.start(layers[0][1])
    for number, (layer, names) in enumerate(layers):
        busy(torch.eye(2048, device=device))
        put(layer, ahead.take(names), device, torch.float32)
        if number + 1 < len(layers):
            ahead.start(layers[number + 1][1])
    ahead.close()
    for layer, names in layers:
        for name, stored in names.items():
            assert torch.equal(layer.get_parameter(name).cpu(), files[stored])
    files.close()

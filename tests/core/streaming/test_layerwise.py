"""The decoder's own loop says how a layer is called: once where that cannot change, each time where it can."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.stopwatch import Stopwatch
from tests.core.tiny import MIXED, FakeRows, tiny_teacher
from tests.core.training.test_streamed_transfer import streamed


@pytest.mark.parametrize(("documents", "passes"), [(False, 3), (True, 2 * (12 + 6) + 2 * 8)])
def test_the_decoders_loop_runs_once_per_layer_unless_rows_hold_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: bool, passes: int
) -> None:
    asked: Counter[int] = Counter()
    until = LayerwiseModel._until

    def watched(self: LayerwiseModel, index: int, batch: dict[str, Any], **given: Any) -> Any:
        asked[index] += "inputs_embeds" in given  # not for the embedding
        return until(self, index, batch, **given)

    monkeypatch.setattr(LayerwiseModel, "_until", watched)
    tiny_teacher("gemma3_text").save_pretrained(tmp_path / "teacher")
    streamed(tmp_path / "teacher", tmp_path / "run", rows=FakeRows(24, documents=documents))
    # Twelve steps and three times two batches of validation a layer (the local one is kept), two passes over eight.
    assert asked.total() == passes


def test_the_time_of_each_part_is_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    stopwatch = Stopwatch(torch.device("cpu"))
    with caplog.at_level("INFO", "lolcats_core.training.streamed_transfer"):
        streamed(tmp_path / "teacher", tmp_path / "run", MIXED, stopwatch=stopwatch)
    parts = {"embedding", "reading weights", "training", "validation", "propagation"}
    assert stopwatch.seconds.keys() == parts
    assert all(seconds > 0 for seconds in stopwatch.seconds.values())
    told = [record.getMessage() for record in caplog.records if "took" in record.getMessage()]
    assert len(told) == 3
    assert all("training" in line and "embedding" not in line for line in (told[0], told[2]))


def test_a_part_inside_another_counts_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 10.0])
    stopwatch = Stopwatch(torch.device("cpu"))
    monkeypatch.setattr(stopwatch, "_now", lambda: next(times))
    with stopwatch.part("outer"), stopwatch.part("inner"):
        pass
    assert stopwatch.seconds == {"inner": 2.0, "outer": 8.0}

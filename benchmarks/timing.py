"""Timing on a GPU without the host (a step is captured in a CUDA graph and replayed) and the tables it fills."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Milliseconds that one replay should at least take, so that its start and end do not count.
REPLAY_MS = 4.0
REPLAYS = 20


def quantiles(prepare: Callable[[], Callable[[], Any]], calls: int | None = None) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the seconds of one call, over replays of several.

    Args:
        prepare: makes the step; runs on the capturing stream, so that autograd's backward does as well.
        calls: how many calls make a replay; as many as fill some milliseconds unless given.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        step = prepare()
        for _ in range(2):
            step()
        start.record()
        step()
        end.record()
        end.synchronize()
        count = calls or max(1, min(50, round(REPLAY_MS / start.elapsed_time(end))))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                step()
        graph.replay()
        seconds = []
        for _ in range(REPLAYS):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / count)
    torch.cuda.current_stream().wait_stream(stream)
    del graph
    torch.cuda.empty_cache()
    cuts = statistics.quantiles(seconds, n=10)
    return cuts[1], statistics.median(seconds), cuts[7]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by part of the work, the device's included: both ends of a part wait for it.

    Attributes:
        seconds: by part; what is inside another part counts there alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is part `name`."""
        begin, before = self._now(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[name] += self._now() - begin - inside

    def since(self, before: Mapping[str, float]) -> str:
        """What was added to `before`, such as ``training 12.1 s, validation 0.3 s``."""
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in self.seconds.items()}
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items() if seconds)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

"""Parameters of operation, in params.yaml beside those of the stages: gates and scheduled re-linearization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lolcats_common.errors import require as _require

GateMode = Literal["enabled", "dry_run", "disabled"]


@dataclass(frozen=True)
class GatesParams:
    """What a registered version must pass before it may serve. ``enabled``: a failure refuses it; ``dry_run``:
    measured and reported; ``disabled``: not measured. `noise`: the standard errors by which a measured score may miss
    its bound. `max_logit_difference` is relative to the largest logit.
    """

    perplexity: GateMode = "enabled"
    max_perplexity_ratio: float = 1.5
    task_recovery: GateMode = "enabled"
    min_task_recovery: float = 0.9
    recall_recovery: GateMode = "dry_run"
    min_recall_recovery: float = 0.9
    earns_bytes: GateMode = "dry_run"
    regression: GateMode = "enabled"
    max_perplexity_regression: float = 0.02
    noise: float = 2.0
    loads: GateMode = "enabled"
    recurrent: GateMode = "enabled"
    left_padding: GateMode = "enabled"
    max_logit_difference: float = 1e-3
    speed: GateMode = "dry_run"
    min_tokens_per_second: float = 1.0
    memory: GateMode = "dry_run"
    max_memory_gib: float = 80.0

    def __post_init__(self) -> None:
        _require(self.max_perplexity_ratio > 0, "`max_perplexity_ratio` must be above 0", self.max_perplexity_ratio)
        _require(self.noise >= 0, "`noise` must be at least 0", self.noise)
        _require(self.max_memory_gib > 0, "`max_memory_gib` must be above 0", self.max_memory_gib)
        for name in ("min_task_recovery", "min_recall_recovery"):
            _require(0 <= getattr(self, name) <= 1, f"`{name}` must lie in [0, 1]", getattr(self, name))
        for name in ("max_perplexity_regression", "max_logit_difference", "min_tokens_per_second"):
            _require(getattr(self, name) >= 0, f"`{name}` must be at least 0", getattr(self, name))


@dataclass(frozen=True)
class RelinearizeParams:
    """`follow_hub`: take the newest commit of a Hugging Face teacher or dataset, not the one that is pinned.

    `drift_source`: recent text (as `data.source`) on which the champion is measured; its perplexity may be at most
    `max_drift` times that of its own validation rows. `drift_tokens`: at most so many are read.
    """

    follow_hub: bool = False
    drift_source: str | None = None
    max_drift: float = 1.2
    drift_tokens: int = 20_000

    def __post_init__(self) -> None:
        _require(self.max_drift > 0, "`max_drift` must be above 0", self.max_drift)
        _require(self.drift_tokens >= 1, "`drift_tokens` must be at least 1", self.drift_tokens)

"""The parameters of both training stages and of the selection between them; `lolcats_common.params` reads the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lolcats_common.errors import require as _require

Criterion = Literal[
    "transfer_error", "normalized_transfer_error", "logit_kl", "greedy_kl", "retrieval", "random", "even"
]
Rung = Mapping[str, int | None]


@dataclass(frozen=True)
class TrainingParams:
    """What both training stages share. Published values: arXiv 2410.10254, appendix A.

    `batch_size` counts rows per forward pass; an optimiser step takes `gradient_accumulation` of them. `max_steps`
    counts optimiser steps and cuts `epochs` short. `eval_every`, `checkpoint_every` and `log_every` count optimiser
    steps.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    schedule: Literal["reduce_on_plateau", "cosine", "constant"] = "reduce_on_plateau"
    warmup_steps: int = 0
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    min_lr: float = 1e-5
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    epochs: int = 2
    max_steps: int | None = None
    eval_every: int = 100
    max_eval_rows: int | None = None
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(self.lr > 0, "`lr` must be greater than 0", self.lr)
        _require(self.weight_decay >= 0, "`weight_decay` must be at least 0", self.weight_decay)
        _require(self.warmup_steps >= 0, "`warmup_steps` must be at least 0", self.warmup_steps)
        _require(0 < self.plateau_factor < 1, "`plateau_factor` must lie in (0, 1)", self.plateau_factor)
        _require(self.plateau_patience >= 0, "`plateau_patience` must be at least 0", self.plateau_patience)
        _require(self.min_lr >= 0, "`min_lr` must be at least 0", self.min_lr)
        _require(self.max_grad_norm > 0, "`max_grad_norm` must be greater than 0", self.max_grad_norm)
        for name in ("batch_size", "gradient_accumulation", "epochs", "eval_every", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, f"`{name}` must be at least 1", getattr(self, name))
        for name in ("max_steps", "max_eval_rows"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"`{name}` must be null or at least 1", value)


@dataclass(frozen=True)
class TransferParams(TrainingParams):
    """Stage 1, attention transfer. `max_steps: 0` is refused; `enabled: false` skips it (the ablation's row).

    `mode`: ``joint`` trains all layers in each pass, ``streamed`` one layer after the other with one in memory;
    ``auto`` takes joint where the model fits. `buffer`: where a streamed run keeps the hidden states.
    `loss_normalization: layer` divides each layer's error by the mean square of its softmax output over the rows of a
    forward pass (each process's own). `window_dropout`: probability with which a layer trains a step without its
    window, so that its linear branch keeps working.
    """

    enabled: bool = True
    mode: Literal["auto", "joint", "streamed"] = "auto"
    buffer: Literal["disk", "memory"] = "disk"
    mse_weight: float = 1000.0
    xent_weight: float = 0.0
    loss_normalization: Literal["none", "layer"] = "none"
    window_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.window_dropout < 1, "`window_dropout` must lie in [0, 1)", self.window_dropout)
        _require(self.mse_weight >= 0, "`mse_weight` must be at least 0", self.mse_weight)
        _require(self.xent_weight >= 0, "`xent_weight` must be at least 0", self.xent_weight)
        _require(
            self.mse_weight + self.xent_weight > 0, "`mse_weight` or `xent_weight` must be above 0", self.mse_weight
        )


@dataclass(frozen=True)
class SelectParams:
    """Which layers or kv groups keep softmax attention after stage 1 has measured them.

    `softmax_budget`: null (those that `linearize` names), or one of ``layers`` (how many), ``heads`` (share of the kv
    groups, rounded) and ``cache_ratio`` (at most that share of the teacher's kv cache).

    `cache_budget`: in place of it, the share of the teacher's bytes at `cache_length` tokens (null: its context) that
    the student's cache may have, everything counted. The `ladder` spends it: its rungs are given to the groups in the
    order of their scores, ``size`` newest tokens (null: all) to so many ``groups``, and as many as fit to the last
    rung, which names none. The groups left over see the `rest` newest tokens or, with null, stay linear. Groups with a
    size see the `first_tokens` of the sequence besides.

    `criterion`: the largest ``transfer_error`` (``normalized_``: over the size of the softmax output), the largest KL
    of the teacher's logits where one alone is linear (``logit_kl``), step by step the one whose softmax lowers the
    student's KL most (``greedy_kl``), the largest loss of the teacher at needles, repeated strings and text where one
    alone is cut to its `probe_window` newest and `first_tokens` first tokens (``retrieval``), and ``random`` and
    ``even`` as controls. `rows`: validation rows for the KL; for ``retrieval``, needles in training text, with half as
    many strings and texts, of `probe_length` tokens each (null: twice the training rows').
    """

    softmax_budget: Mapping[str, float] | None = field(default=None, hash=False)
    cache_budget: float | None = None
    cache_length: int | None = None
    ladder: tuple[Rung, ...] = field(default=({"size": None, "groups": 2}, {"size": 1536}), hash=False)
    rest: int | None = None
    first_tokens: int = 4
    criterion: Criterion = "transfer_error"
    rows: int = 8
    probe_length: int | None = None
    probe_window: int = 192

    def __post_init__(self) -> None:
        _require(self.rows >= 1, "`rows` must be at least 1", self.rows)
        _require(self.first_tokens >= 0, "`first_tokens` must be at least 0", self.first_tokens)
        least = max(2, self.first_tokens + 1)
        above = f"2 and above `first_tokens` ({self.first_tokens})"
        _require(self.probe_window >= least, f"`probe_window` must be at least {above}", self.probe_window)
        _require(self.rest is None or self.rest >= least, f"`rest` must be null or at least {above}", self.rest)
        _require(
            self.cache_length is None or self.cache_length >= 1,
            "`cache_length` must be null or at least 1",
            self.cache_length,
        )
        long = self.probe_length is None or self.probe_length > 2 * self.probe_window
        _require(
            long, f"`probe_length` must be null or above twice `probe_window` ({self.probe_window})", self.probe_length
        )
        for place, rung in enumerate(self.ladder):
            name, last = f"`ladder[{place}]`", place == len(self.ladder) - 1
            known = "size" in rung and rung.keys() <= {"size", "groups"}
            _require(known, f"{name} must have the key size and may have groups", dict(rung))
            size, groups = rung["size"], rung.get("groups")
            _require(size is None or size >= least, f"{name}: size must be null or at least {above}", size)
            _require(last == (groups is None), f"{name}: only the last rung has no groups", groups)
            _require(groups is None or groups >= 1, f"{name}: groups must be at least 1", groups)
        _require(len(self.ladder) > 0, "`ladder` must have a rung", list(self.ladder))
        budget = self.softmax_budget
        if self.cache_budget is not None:
            _require(0 < self.cache_budget < 1, "`cache_budget` must lie in (0, 1)", self.cache_budget)
            _require(budget is None, "`softmax_budget` must be null with `cache_budget`", budget)
            _require(self.criterion != "even", "`criterion` must rank for `cache_budget`", self.criterion)
        if budget is None:
            return
        one = len(budget) == 1 and next(iter(budget)) in ("layers", "heads", "cache_ratio")
        _require(one, "`softmax_budget` must be null or have one key, layers, heads or cache_ratio", dict(budget))
        (kind, value), *_ = budget.items()
        if kind == "layers":
            _require(value >= 1 and value == int(value), "`softmax_budget.layers` must be at least 1", value)
        else:
            _require(0 < value < 1, f"`softmax_budget.{kind}` must lie in (0, 1)", value)

    @property
    def chooses(self) -> bool:
        """Whether there is a budget, of either kind."""
        return self.softmax_budget is not None or self.cache_budget is not None


@dataclass(frozen=True)
class FinetuneParams(TrainingParams):
    """Stage 2, low-rank linearizing (LoRA on the projections, next-token cross-entropy).

    `loss`: ``logit_kl`` follows the teacher's logits, ``mixed`` gives them `kl_weight` of the whole and cross-entropy
    the rest; `hidden_weight` adds each layer's error against the teacher's hidden states, over their size.
    `train_feature_maps`: the maps train on, with `map_lr` (null: `lr`) and `map_weight_decay`.
    `window_dropout`: as in `TransferParams`.
    `quantize_base`: hold the frozen projections in 4 bits while LoRA trains; the result is merged into the teacher's
    own weights. `segment_length`: take rows in pieces of so many tokens, the state passed on without gradients.
    """

    lr: float = 1e-4
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    loss: Literal["cross_entropy", "logit_kl", "mixed"] = "cross_entropy"
    kl_weight: float = 0.5
    kl_temperature: float = 1.0
    hidden_weight: float = 0.0
    train_feature_maps: bool = False
    map_lr: float | None = None
    map_weight_decay: float = 0.0
    window_dropout: float = 0.0
    quantize_base: bool = False
    segment_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        segment = self.segment_length
        _require(segment is None or segment >= 8, "`segment_length` must be null or at least 8", segment)
        _require(self.hidden_weight >= 0, "`hidden_weight` must be at least 0", self.hidden_weight)
        plain = segment is None or not self.needs_teacher
        _require(plain, "`segment_length` must be null with `loss` logit_kl or mixed and `hidden_weight`", segment)
        _require(0 < self.kl_weight <= 1, "`kl_weight` must lie in (0, 1]", self.kl_weight)
        _require(self.kl_temperature > 0, "`kl_temperature` must be greater than 0", self.kl_temperature)
        _require(self.map_lr is None or self.map_lr > 0, "`map_lr` must be null or greater than 0", self.map_lr)
        _require(self.map_weight_decay >= 0, "`map_weight_decay` must be at least 0", self.map_weight_decay)
        _require(0 <= self.window_dropout < 1, "`window_dropout` must lie in [0, 1)", self.window_dropout)
        _require(self.lora_rank >= 1, "`lora_rank` must be at least 1", self.lora_rank)
        _require(self.lora_alpha >= 1, "`lora_alpha` must be at least 1", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "`lora_dropout` must lie in [0, 1)", self.lora_dropout)
        _require(len(self.target_modules) > 0, "`target_modules` must name a projection", self.target_modules)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher, which costs a forward pass of it."""
        return self.loss != "cross_entropy" or self.hidden_weight > 0


@dataclass(frozen=True)
class ImageFinetuneParams(TrainingParams):
    """Stage 2 of vision transformers.

    `loss`: ``feature`` aligns the backbone's last hidden states with the teacher's, the recipe that recovers most;
    ``logit_kl``, ``cross_entropy`` (published, needs labels) and ``mixed`` (`kl_weight` of the first, the rest of the
    second) need a classifier. `scope`: ``lora`` (published) on `target_modules` (null: every projection of the
    attention), or ``full``, all parameters, beside a copy of the teacher.
    `train_feature_maps`: with ``lora``, the maps train on; with ``full`` they do.
    """

    lr: float = 1e-4
    loss: Literal["feature", "logit_kl", "cross_entropy", "mixed"] = "feature"
    scope: Literal["lora", "full"] = "lora"
    kl_weight: float = 0.5
    kl_temperature: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    train_feature_maps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        losses, scopes = ("feature", "logit_kl", "cross_entropy", "mixed"), ("lora", "full")
        _require(self.loss in losses, f"`loss` must be one of {', '.join(losses)}", self.loss)
        _require(self.scope in scopes, f"`scope` must be one of {', '.join(scopes)}", self.scope)
        _require(0 < self.kl_weight <= 1, "`kl_weight` must lie in (0, 1]", self.kl_weight)
        _require(self.kl_temperature > 0, "`kl_temperature` must be greater than 0", self.kl_temperature)
        _require(self.lora_rank >= 1, "`lora_rank` must be at least 1", self.lora_rank)
        _require(self.lora_alpha >= 1, "`lora_alpha` must be at least 1", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "`lora_dropout` must lie in [0, 1)", self.lora_dropout)
        some = self.target_modules is None or len(self.target_modules) > 0
        _require(some, "`target_modules` must be null or name a projection", self.target_modules)

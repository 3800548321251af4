"""The paper's ablation (arXiv 2410.10254, section 4.2 and appendix B) as a list of trials.

Every trial takes as many optimiser steps. One without attention transfer trains maps and LoRA together for the steps
that the others spend on both stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams, Params, SelectParams
from lolcats_core.experiments.controls import window_perplexity
from lolcats_core.experiments.study import EvalSettings, StudyContext
from lolcats_core.experiments.trials import Trial, run_trial, run_trials

SECTIONS = ("grid", "lora_rank", "projections", "window_size", "transfer_steps", "softmax_layers")
FEATURE_MAPS: tuple[Literal["hedgehog", "t2r"], ...] = ("hedgehog", "t2r")
WINDOWS: tuple[Literal["none", "terraced", "sliding"], ...] = ("none", "terraced", "sliding")
KEY_MAPS: tuple[Literal["query_head", "kv_head"], ...] = ("query_head", "kv_head")
LORA_RANKS = (4, 8, 16, 64)
WINDOW_SIZES = (4, 8, 16, 32, 64, 128, 256)
KEPT_LAYERS = (1, 2, 3)
# Rows of the validations inside training, which only tell the first weights from the last.
VALIDATION_ROWS = 4
CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Budget:
    """What every trial may spend. `steps`: optimiser steps of each stage."""

    steps: int = 20
    batch_size: int = 2
    eval_rows: int = 12
    recall_gap: int = 128
    recall_samples: int = 8

    def training(self) -> dict[str, Any]:
        """Parameters of both stages; a trial is short, so it keeps few checkpoints."""
        return {
            "batch_size": self.batch_size,
            "gradient_accumulation": 1,
            "epochs": 10_000,
            "eval_every": 10_000,
            "max_eval_rows": min(self.eval_rows, VALIDATION_ROWS),
            "checkpoint_every": CHECKPOINT_EVERY,
            "max_steps": self.steps,
        }

    def evaluation(self, seed: int) -> EvalSettings:
        """Perplexity and recall at one gap."""
        return EvalSettings(
            batch_size=self.batch_size,
            perplexity_rows=self.eval_rows,
            recall_gaps=(self.recall_gap,),
            recall_samples=self.recall_samples,
            recall_seed=seed,
            generation_prompts=0,
            audit_rows=0,
        )


def projections(teacher: nn.Module, base: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sets of projections to adapt: parts of `base`, `base`, and every projection of a layer."""
    layers = cast(Any, teacher).base_model.layers
    every = tuple(dict.fromkeys(n.rpartition(".")[2] for n, m in layers.named_modules() if isinstance(m, nn.Linear)))
    parts = [base[:2], base[2:]] if len(base) == 4 else []
    return [*parts, base, *([every] if set(every) > set(base) else [])]


def check_sections(sections: Sequence[str]) -> None:
    """Refuse sections that do not exist.

    Raises:
        UserError: naming the first one and those there are.
    """
    for section in sections:
        if section not in SECTIONS:
            raise UserError(f"a section must be one of {', '.join(SECTIONS)}, got {section!r}")


def published_trial(params: Params, budget: Budget) -> Trial:
    """The published recipe, from which the one-dimensional sections depart."""
    settings = dataclasses.replace(
        params.linearize,
        window="terraced",
        feature_map="hedgehog",
        k_map_per="query_head",
        softmax_layers=(),
        softmax_heads={},
        softmax_windows={},
    )
    finetune = dataclasses.replace(
        params.finetune,
        **budget.training(),
        lora_alpha=2 * params.finetune.lora_rank,
        train_feature_maps=False,
    )
    transfer = dataclasses.replace(params.transfer, **budget.training(), enabled=True)
    return Trial("softmax_layers/published recipe", settings, transfer, SelectParams(), finetune, params.seed)


def trials(
    params: Params, budget: Budget, projection_sets: Sequence[tuple[str, ...]], sections: Sequence[str] = SECTIONS
) -> list[Trial]:
    """Every trial of the sections asked for, named ``section/label``.

    `softmax_layers` is not among them, since it needs the published recipe's errors (`kept_layer_trials`).
    """
    published = published_trial(params, budget)
    result = _grid(params, published) if "grid" in sections else []

    def add(section: str, label: str, **changes: Any) -> None:
        if section in sections:
            result.append(dataclasses.replace(published, name=f"{section}/{label}", **changes))

    def finetune(**changes: Any) -> FinetuneParams:
        return dataclasses.replace(_finetune(published), **changes)

    for rank in sorted({*LORA_RANKS, params.finetune.lora_rank}):
        add("lora_rank", f"rank {rank}", finetune=finetune(lora_rank=rank, lora_alpha=2 * rank))
    for names in projection_sets:
        add("projections", ", ".join(names), finetune=finetune(target_modules=names))
    for size in WINDOW_SIZES:
        add("window_size", f"window {size}", linearize=dataclasses.replace(published.linearize, window_size=size))
    for steps in sorted({max(1, budget.steps // 4), max(1, budget.steps // 2), budget.steps, 2 * budget.steps}):
        transfer = dataclasses.replace(published.transfer, max_steps=steps)
        add("transfer_steps", f"{steps} transfer steps", transfer=transfer)
    return result


def _grid(params: Params, published: Trial) -> list[Trial]:
    """Feature map x window x key maps, each without and with attention transfer."""
    finetune = _finetune(published)
    both_stages = dataclasses.replace(finetune, max_steps=2 * cast(int, finetune.max_steps), train_feature_maps=True)
    result = []
    for feature_map in FEATURE_MAPS:
        for window in WINDOWS:
            for key_maps in KEY_MAPS:
                settings = dataclasses.replace(
                    params.linearize,
                    feature_map=feature_map,
                    window=window,
                    k_map_per=key_maps,
                    feature_map_bias=feature_map == "t2r",  # the paper's T2R has one
                )
                name = f"grid/{feature_map}, {window}, {key_maps}"
                trial = dataclasses.replace(published, name=f"{name}, transfer", linearize=settings)
                skipped = dataclasses.replace(trial.transfer, enabled=False)
                without = dataclasses.replace(
                    trial, name=f"{name}, no transfer", transfer=skipped, finetune=both_stages
                )
                result += [without, trial]
    return result


def _finetune(trial: Trial) -> FinetuneParams:
    """Stage 2 of a trial of the ablation, which always has one."""
    return cast(FinetuneParams, trial.finetune)


def kept_layer_trials(published: Trial, layer_errors: Mapping[int, float]) -> list[Trial]:
    """Ours beside the published recipe: the layers with the largest transfer error keep softmax attention.

    Args:
        layer_errors: mean squared error of each layer after the published recipe's attention transfer.
    """
    worst = sorted(layer_errors, key=lambda layer: -layer_errors[layer])
    result = [published]
    for count in KEPT_LAYERS:
        if count < len(worst):
            kept = tuple(sorted(worst[:count]))
            settings = dataclasses.replace(published.linearize, softmax_layers=kept)
            label = f"softmax kept in layer{'s' if count > 1 else ''} {', '.join(map(str, kept))}"
            result.append(dataclasses.replace(published, name=f"softmax_layers/{label}", linearize=settings))
    return result


def run(
    study: StudyContext,
    params: Params,
    budget: Budget,
    sections: Sequence[str] = SECTIONS,
    note: Callable[[Trial, dict[str, Any]], None] = lambda trial, row: None,
) -> list[dict[str, Any]]:
    """Train and measure every trial of `sections`; those that another process works on are left to it.

    Args:
        study: whose settings are `Budget.evaluation`.
        note: called with each trial and its row as they come.

    Returns:
        A row per trial in the order of the table (`table_row`).
    """

    def rows_of(found: Sequence[Trial]) -> list[dict[str, Any]]:
        results = run_trials(found, study, lambda trial, result: note(trial, table_row(trial, result)))
        return [table_row(trial, result) for trial, result in zip(found, results, strict=True)]

    found = trials(params, budget, projections(study.teacher, params.finetune.target_modules), sections)
    # Where the window sees all of a row nothing is linear, so there is nothing to train.
    length = study.train_rows.sequence_length
    rows = rows_of([trial for trial in found if trial.linearize.window_reach < length])
    if "softmax_layers" in sections:
        published = published_trial(params, budget)
        errors = cast(dict[str, Any], run_trial(published, study))["layer_errors"]
        rows += rows_of(kept_layer_trials(published, {int(layer): value for layer, value in errors.items()}))
    return rows


def table_row(trial: Trial, result: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's section, label and settings with what became of it, as plain values.

    Returns:
        Among them ``before`` and ``after`` (perplexity without and with LoRA), ``control`` (the latter of a plain
        window in the same bytes; None where it was not trained), ``recall``, ``layer_errors`` (after transfer) and
        ``tokens``; None for what could not be measured because the trial diverged.
    """
    section, _, label = trial.name.partition("/")
    before, after = (result[step] or {} for step in ("transferred", "finetuned"))
    return {
        "section": section,
        "label": label,
        "linearize": trial.linearize.to_dict(),
        "transfer_steps": trial.transfer.max_steps if trial.transfer.enabled else 0,
        "lora_rank": _finetune(trial).lora_rank,
        "target_modules": list(_finetune(trial).target_modules),
        "before": before.get("perplexity"),
        "after": after.get("perplexity"),
        "control": window_perplexity(result, "finetuned"),
        "recall": next(iter(after.get("recall", {}).values()), None),
        "layer_errors": result["layer_errors"],
        "tokens": result["tokens"],
    }

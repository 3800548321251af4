"""The paper's ablation (arXiv 2410.10254, section 4.2 and appendix B): which rows there are, one row, and the ordering.

Every row starts from the same teacher, rows of text and seed and takes as many optimiser steps. A row without attention
transfer trains maps and LoRA together for the steps that the others spend on both stages.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedModel

from lolcats_core.config import LinearizeConfig
from lolcats_core.errors import UserError
from lolcats_core.evaluation.perplexity import perplexity
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.files import sha256_json, write_json
from lolcats_core.finetune import low_rank_finetune
from lolcats_core.modeling import linearize, load_feature_maps, save_feature_maps
from lolcats_core.params import FinetuneParams, TransferParams
from lolcats_core.training import Rows
from lolcats_core.transfer import attention_transfer, evaluate_transfer

logger = logging.getLogger(__name__)
SECTIONS = ("grid", "lora_rank", "projections", "window_size", "transfer_steps", "softmax_layers")
FEATURE_MAPS = ("hedgehog", "t2r")
WINDOWS: tuple[Literal["none", "terraced", "sliding"], ...] = ("none", "terraced", "sliding")
KEY_MAPS: tuple[Literal["query_head", "kv_head"], ...] = ("query_head", "kv_head")
LORA_RANKS = (4, 8, 16, 64)
WINDOW_SIZES = (4, 8, 16, 32, 64, 128, 256)
KEPT_LAYERS = (1, 2)
# Rows of the validations inside training, which only tell the first weights from the last.
VALIDATION_ROWS = 4


@dataclass(frozen=True)
class Budget:
    """What every row may spend. `steps`: optimiser steps of each stage."""

    steps: int = 20
    batch_size: int = 2
    eval_rows: int = 12
    recall_gap: int = 128
    recall_samples: int = 8


@dataclass(frozen=True)
class Row:
    """One row: its section, what it is called there, and the settings that make it."""

    section: str
    label: str
    linearize: LinearizeConfig
    transfer_steps: int
    lora_rank: int
    target_modules: tuple[str, ...]

    def key(self) -> str:
        """Names the settings alone, so that a row that stands in two sections is trained once."""
        settings = {**dataclasses.asdict(self), "linearize": self.linearize.to_dict()}
        return sha256_json({name: settings[name] for name in settings if name not in ("section", "label")})[:16]


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    teacher: PreTrainedModel
    train_rows: Rows
    validation_rows: Rows
    transfer: TransferParams
    finetune: FinetuneParams
    budget: Budget
    seed: int
    scratch: Path
    exclude_ids: tuple[int, ...] = ()


def projections(teacher: nn.Module, base: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sets of projections to adapt: parts of `base`, `base`, and every projection of a layer."""
    layers = cast(Any, teacher).base_model.layers
    every = tuple(dict.fromkeys(n.rpartition(".")[2] for n, m in layers.named_modules() if isinstance(m, nn.Linear)))
    parts = [base[:2], base[2:]] if len(base) == 4 else []
    return [*parts, base, *([every] if set(every) > set(base) else [])]


def rows(
    base: LinearizeConfig,
    finetune: FinetuneParams,
    budget: Budget,
    projection_sets: Sequence[tuple[str, ...]],
    sections: Sequence[str] = SECTIONS,
) -> list[Row]:
    """Every row of the sections asked for, but `softmax_layers`, which needs the base row's errors (`kept_rows`).

    Raises:
        UserError: a section does not exist.
    """
    for section in sections:
        if section not in SECTIONS:
            raise UserError(f"`--section` must be one of {', '.join(SECTIONS)}, got {section!r}")
    common = {"lora_rank": finetune.lora_rank, "target_modules": finetune.target_modules}
    found: list[Row] = []
    for feature_map in FEATURE_MAPS:
        for window in WINDOWS:
            for key_maps in KEY_MAPS:
                for steps in (0, budget.steps):
                    settings = dataclasses.replace(
                        base,
                        feature_map=feature_map,  # type: ignore[arg-type]
                        window=window,
                        k_map_per=key_maps,
                        feature_map_bias=feature_map == "t2r",  # the paper's T2R has one
                    )
                    label = f"{feature_map}, {window}, {key_maps}, {'transfer' if steps else 'no transfer'}"
                    found.append(Row("grid", label, settings, steps, **common))  # type: ignore[arg-type]
    base_row = base_of(base, finetune, budget)
    for rank in sorted({*LORA_RANKS, finetune.lora_rank}):
        found.append(dataclasses.replace(base_row, section="lora_rank", label=f"rank {rank}", lora_rank=rank))
    for names in projection_sets:
        label = ", ".join(names)
        found.append(dataclasses.replace(base_row, section="projections", label=label, target_modules=names))
    for size in WINDOW_SIZES:
        settings = dataclasses.replace(base_row.linearize, window_size=size)
        found.append(dataclasses.replace(base_row, section="window_size", label=f"window {size}", linearize=settings))
    for steps in sorted({max(1, budget.steps // 4), max(1, budget.steps // 2), budget.steps, 2 * budget.steps}):
        label = f"{steps} transfer steps"
        found.append(dataclasses.replace(base_row, section="transfer_steps", label=label, transfer_steps=steps))
    return [row for row in found if row.section in sections]


def base_of(base: LinearizeConfig, finetune: FinetuneParams, budget: Budget) -> Row:
    """The published recipe, from which the one-dimensional sections depart."""
    settings = dataclasses.replace(
        base, window="terraced", feature_map="hedgehog", k_map_per="query_head", softmax_layers=(), softmax_heads={}
    )
    label = "published recipe"
    return Row("softmax_layers", label, settings, budget.steps, finetune.lora_rank, finetune.target_modules)


def kept_rows(published: Row, layer_errors: Mapping[int, float]) -> list[Row]:
    """Ours beside the published recipe: the layers with the largest transfer error keep softmax attention.

    Args:
        layer_errors: mean squared error of each layer after the published recipe's attention transfer.
    """
    worst = sorted(layer_errors, key=lambda layer: -layer_errors[layer])
    found = [published]
    for count in KEPT_LAYERS:
        if count < len(worst):
            kept = tuple(sorted(worst[:count]))
            settings = dataclasses.replace(published.linearize, softmax_layers=kept)
            label = f"softmax kept in layer{'s' if count > 1 else ''} {', '.join(map(str, kept))}"
            found.append(dataclasses.replace(published, label=label, linearize=settings))
    return found


def run_row(row: Row, setting: Setting) -> dict[str, Any]:
    """Train and measure one row; kept as JSON in the scratch directory, so that a killed ablation continues.

    Returns:
        ``before`` and ``after`` (perplexity without and with LoRA), ``recall``, ``layer_errors`` (after transfer) and
        ``tokens``; a perplexity that diverged is None.
    """
    file = setting.scratch / f"row-{row.key()}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    budget, work = setting.budget, setting.scratch / f"row-{row.key()}"
    student = linearize(setting.teacher, row.linearize, seed=setting.seed)
    errors = _transfer(student, row, setting)
    before = _perplexity(student, setting)
    training = dataclasses.replace(
        setting.finetune,
        batch_size=budget.batch_size,
        gradient_accumulation=1,
        max_steps=budget.steps if row.transfer_steps else 2 * budget.steps,
        epochs=10_000,
        eval_every=10_000,
        max_eval_rows=min(budget.eval_rows, VALIDATION_ROWS),
        lora_rank=row.lora_rank,
        lora_alpha=2 * row.lora_rank,
        target_modules=row.target_modules,
        train_feature_maps=row.transfer_steps == 0,
    )
    adapted, result = low_rank_finetune(
        student, setting.train_rows, setting.validation_rows, training, scratch=work, seed=setting.seed
    )
    measured = {
        "before": before,
        "after": _perplexity(adapted, setting),
        "recall": _recall(adapted, setting),
        "layer_errors": errors,
        "tokens": result.tokens + row.transfer_steps * budget.batch_size * int(setting.train_rows.sequence_length),
    }
    write_json(file, measured)
    shutil.rmtree(work, ignore_errors=True)
    shown = {name: value for name, value in measured.items() if isinstance(value, float)}
    logger.info("%s: %s", row.label, "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    return measured


def _transfer(student: PreTrainedModel, row: Row, setting: Setting) -> dict[str, float]:
    """Attention transfer, shared by all rows with the same maps; each layer's error by its number."""
    budget = setting.budget
    params = dataclasses.replace(
        setting.transfer,
        batch_size=budget.batch_size,
        gradient_accumulation=1,
        max_steps=row.transfer_steps or None,
        epochs=10_000,
        eval_every=10_000,
        max_eval_rows=min(budget.eval_rows, VALIDATION_ROWS),
    )
    if row.transfer_steps:
        key = sha256_json({"linearize": row.linearize.to_dict(), "steps": row.transfer_steps})[:16]
        maps = setting.scratch / f"maps-{key}.safetensors"
        if maps.is_file():
            load_feature_maps(student, maps)
        else:
            attention_transfer(
                student,
                setting.train_rows,
                setting.validation_rows,
                params,
                scratch=maps.with_suffix(""),
                seed=setting.seed,
            )
            save_feature_maps(student, maps)
            shutil.rmtree(maps.with_suffix(""), ignore_errors=True)
    losses = evaluate_transfer(student, setting.validation_rows, params, student.device)
    return {str(int(name.removeprefix("layer_"))): value for name, value in losses.items() if name != "loss"}


def _perplexity(model: nn.Module, setting: Setting) -> float | None:
    budget = setting.budget
    try:
        result = perplexity(
            model, setting.validation_rows, batch_size=budget.batch_size, max_rows=budget.eval_rows, name="a row"
        )
    except UserError as error:
        logger.warning("%s", error)
        return None
    return result.perplexity


def _recall(model: nn.Module, setting: Setting) -> float:
    budget = setting.budget
    return copy_recall(
        model,
        setting.teacher.config.vocab_size,
        (budget.recall_gap,),
        budget.recall_samples,
        setting.seed,
        budget.batch_size,
        exclude_ids=setting.exclude_ids,
    )[budget.recall_gap].value


def teacher_row(setting: Setting) -> dict[str, float | None]:
    """The teacher's own `perplexity` and `recall`."""
    return {"perplexity": _perplexity(setting.teacher, setting), "recall": _recall(setting.teacher, setting)}


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, whether it holds here, and the numbers that say so."""

    text: str
    holds: bool
    numbers: str


def published_ordering(measured: Mapping[str, Mapping[str, Any]], base: LinearizeConfig) -> list[Claim]:
    """The orderings of the paper's ablation, held against the grid.

    Args:
        measured: results by the label of the grid's rows (`rows`).

    Raises:
        KeyError: the grid is not complete.
    """

    def value(feature_map: str, window: str, transfer: bool, name: str = "after") -> float:
        label = f"{feature_map}, {window}, {base.k_map_per}, {'transfer' if transfer else 'no transfer'}"
        found = measured[label][name]
        return float("inf") if found is None else float(found)

    def claim(text: str, *pairs: tuple[float, float]) -> Claim:
        numbers = ", ".join(f"{low:.4g} < {high:.4g}" for low, high in pairs)
        return Claim(text, all(low < high for low, high in pairs), numbers)

    maps = FEATURE_MAPS
    return [
        claim(
            "attention transfer lowers perplexity before LoRA (published: 60.9 instead of 2448)",
            *((value(m, "none", True, "before"), value(m, "none", False, "before")) for m in maps),
        ),
        claim(
            "attention transfer lowers final perplexity at equal steps (published: hedgehog 3.90 < 9.02, t2r 4.11 < "
            "16.05)",
            *((value(m, "none", True), value(m, "none", False)) for m in maps),
        ),
        claim(
            "hedgehog is below t2r without and with transfer (published: 9.02 < 16.05, 3.90 < 4.11)",
            *((value("hedgehog", "none", t), value("t2r", "none", t)) for t in (False, True)),
        ),
        claim(
            "a softmax window lowers it further, terraced and sliding alike",
            *((value(m, w, True), value(m, "none", True)) for m in maps for w in WINDOWS[1:]),
        ),
    ]

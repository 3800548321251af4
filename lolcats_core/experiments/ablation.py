"""The paper's ablation (arXiv 2410.10254, section 4.2 and appendix B): which rows there are, one row, and the ordering.

Every row starts from the same teacher, rows of text and seed and takes as many optimiser steps. A row without attention
transfer trains maps and LoRA together for the steps that the others spend on both stages. Rows with the same maps share
one attention transfer, each finished row is kept, and several processes over one scratch directory share the work.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout
from torch import nn
from transformers import PreTrainedModel

from lolcats_common.errors import DivergedError, UserError
from lolcats_common.files import sha256_json, write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import FinetuneParams, Params, TransferParams
from lolcats_core.compute.device import resolve_device, resolve_dtype, seed_everything
from lolcats_core.data.rows import TokenRows
from lolcats_core.evaluation.recall import copy_recall, special_ids
from lolcats_core.model.map_files import load_feature_maps, save_feature_maps
from lolcats_core.model.modeling import linearize
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.attention_transfer import attention_transfer, evaluate_transfer
from lolcats_core.training.loop import Rows
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.perplexity import perplexity

logger = logging.getLogger(__name__)
SECTIONS = ("grid", "lora_rank", "projections", "window_size", "transfer_steps", "softmax_layers")
FEATURE_MAPS = ("hedgehog", "t2r")
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
    """What every row may spend. `steps`: optimiser steps of each stage."""

    steps: int = 20
    batch_size: int = 2
    eval_rows: int = 12
    recall_gap: int = 128
    recall_samples: int = 8

    def slug(self) -> str:
        """Its values as a part of a file's name."""
        return "-".join(map(str, dataclasses.astuple(self)))


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
    """What all rows share. `linearize`: what a row does not change; `scratch`: of this setting alone."""

    teacher: PreTrainedModel
    train_rows: Rows
    validation_rows: Rows
    linearize: LinearizeConfig
    transfer: TransferParams
    finetune: FinetuneParams
    budget: Budget
    seed: int
    scratch: Path
    exclude_ids: tuple[int, ...] = ()


def load_setting(pin: Path, rows: Path, params: Params, budget: Budget, scratch: Path) -> Setting:
    """The setting of a pinned teacher (`lolcats_core.teacher.pin`) and the token rows in `rows`/train and /validation.

    Raises:
        UserError: the teacher or the rows are missing or damaged, or the device does not exist.
    """
    seed_everything(params.seed)
    source = Teacher.open(pin)
    tokenizer = source.tokenizer()
    dtype, device = resolve_dtype(params.compute.precision), resolve_device(params.compute.device)
    return Setting(
        teacher=source.load(dtype, device),
        train_rows=TokenRows.open(rows / "train"),
        validation_rows=TokenRows.open(rows / "validation"),
        linearize=params.linearize,
        transfer=params.transfer,
        finetune=params.finetune,
        budget=budget,
        seed=params.seed,
        scratch=scratch,
        exclude_ids=special_ids(tokenizer),
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


def rows(
    base: LinearizeConfig,
    finetune: FinetuneParams,
    budget: Budget,
    projection_sets: Sequence[tuple[str, ...]],
    sections: Sequence[str] = SECTIONS,
) -> list[Row]:
    """Every row of the sections asked for, but `softmax_layers`, which needs the base row's errors (`kept_rows`)."""
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


def run(
    setting: Setting,
    sections: Sequence[str] = SECTIONS,
    note: Callable[[Row, dict[str, Any]], None] = lambda row, measured: None,
) -> list[dict[str, Any]]:
    """Train and measure every row of `sections`; those that another process works on are left to it.

    Args:
        note: called with each row and its measurements (`run_row`) as they come.

    Returns:
        In the order of the table, a row's section, label and settings with its measurements.
    """
    sets = projections(setting.teacher, setting.finetune.target_modules)
    found = rows(setting.linearize, setting.finetune, setting.budget, sets, sections)
    results = _run_all(found, setting, note)
    if "softmax_layers" in sections:
        published = base_of(setting.linearize, setting.finetune, setting.budget)
        errors = cast(dict[str, Any], run_row(published, setting))["layer_errors"]
        results += _run_all(kept_rows(published, {int(n): value for n, value in errors.items()}), setting, note)
    return results


def _run_all(
    found: Sequence[Row], setting: Setting, note: Callable[[Row, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    measured: dict[int, dict[str, Any]] = {}
    for wait in (False, True):  # first what nobody works on, then what others have finished meanwhile
        for number, row in enumerate(found):
            if number not in measured and (result := run_row(row, setting, wait=wait)) is not None:
                measured[number] = result
                logger.info("%d of %d rows", len(measured), len(found))
                note(row, result)
    return [_described(row) | measured[number] for number, row in enumerate(found)]


def _described(row: Row) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return values | {"target_modules": list(row.target_modules), "linearize": row.linearize.to_dict()}


def run_row(row: Row, setting: Setting, *, wait: bool = True) -> dict[str, Any] | None:
    """Train and measure one row; kept as JSON in the scratch directory, so that a killed ablation continues.

    Args:
        wait: for another process that is at this row; otherwise None is returned then.

    Returns:
        ``before`` and ``after`` (perplexity without and with LoRA), ``recall``, ``layer_errors`` (after transfer) and
        ``tokens``; of a row that diverged, None for what could not be measured.
    """
    file = setting.scratch / f"row-{row.key()}.json"
    setting.scratch.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file.with_suffix(".lock"), blocking=wait):
            if not file.is_file():
                measured = _measure(row, setting, file.with_suffix(""))
                write_json(file, measured)
                shown = "  ".join(f"{name} {v:.4g}" for name, v in measured.items() if isinstance(v, float))
                logger.info("%s, %s: %s", row.section, row.label, shown)
    except Timeout:
        return None
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _measure(row: Row, setting: Setting, work: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {"before": None, "after": None, "recall": None, "layer_errors": {}, "tokens": 0}
    student = linearize(setting.teacher, row.linearize, seed=setting.seed)
    try:
        measured["layer_errors"] = _transfer(student, row, setting)
        measured["before"] = _perplexity(student, setting)
        training = dataclasses.replace(
            setting.finetune,
            **_training(setting.budget),
            max_steps=setting.budget.steps * (1 if row.transfer_steps else 2),
            lora_rank=row.lora_rank,
            lora_alpha=2 * row.lora_rank,
            target_modules=row.target_modules,
            train_feature_maps=row.transfer_steps == 0,
        )
        adapted, result = low_rank_finetune(
            student, setting.train_rows, setting.validation_rows, training, scratch=work, seed=setting.seed
        )
        before_lora = row.transfer_steps * setting.budget.batch_size * int(setting.train_rows.sequence_length)
        measured["tokens"] = result.tokens + before_lora
        measured["after"] = _perplexity(adapted, setting)
        measured["recall"] = _recall(adapted, setting)
    except DivergedError as error:
        logger.warning("%s, %s: diverged: %s", row.section, row.label, error)
    shutil.rmtree(work, ignore_errors=True)
    return measured


def _training(budget: Budget) -> dict[str, Any]:
    """What a budget decides in the parameters of both stages; a row is short, so it keeps few checkpoints."""
    return {
        "batch_size": budget.batch_size,
        "gradient_accumulation": 1,
        "epochs": 10_000,
        "eval_every": 10_000,
        "max_eval_rows": min(budget.eval_rows, VALIDATION_ROWS),
        "checkpoint_every": CHECKPOINT_EVERY,
    }


def _transfer(student: PreTrainedModel, row: Row, setting: Setting) -> dict[str, float]:
    """Attention transfer, shared by all rows with the same maps; each layer's error by its number."""
    params = dataclasses.replace(setting.transfer, **_training(setting.budget), max_steps=row.transfer_steps or None)
    if row.transfer_steps:
        key = sha256_json({"linearize": row.linearize.to_dict(), "steps": row.transfer_steps})[:16]
        maps = setting.scratch / f"maps-{key}.safetensors"
        with FileLock(maps.with_suffix(".lock")):
            if not maps.is_file():
                work = maps.with_suffix("")
                attention_transfer(
                    student, setting.train_rows, setting.validation_rows, params, scratch=work, seed=setting.seed
                )
                save_feature_maps(student, maps)
                shutil.rmtree(work, ignore_errors=True)
        load_feature_maps(student, maps)
    losses = evaluate_transfer(student, setting.validation_rows, params, student.device)
    if not math.isfinite(losses["loss"]):
        raise DivergedError(f"the loss of attention transfer is {losses['loss']}")
    return {str(int(name.removeprefix("layer_"))): value for name, value in losses.items() if name != "loss"}


def _perplexity(model: nn.Module, setting: Setting) -> float:
    budget = setting.budget
    return perplexity(
        model, setting.validation_rows, batch_size=budget.batch_size, max_rows=budget.eval_rows, name="a row"
    ).perplexity


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


def teacher_row(setting: Setting) -> dict[str, float]:
    """The teacher's own `perplexity` and `recall`."""
    return {"perplexity": _perplexity(setting.teacher, setting), "recall": _recall(setting.teacher, setting)}

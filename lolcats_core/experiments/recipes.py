"""Whole recipes side by side: stage 1, selection, stage 2 and what became of perplexity, recall and memory.

Every recipe starts from the same teacher and rows. Those with the same maps share one attention transfer, so a row
that only chooses other softmax heads costs no more than its second stage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_json, write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import Params, apply_overrides, params_from_dict
from lolcats_common.training_params import TrainingParams
from lolcats_core.compute.device import seed_everything
from lolcats_core.evaluation import generation
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.evaluation.results import model_hash
from lolcats_core.model.branches import without_branch
from lolcats_core.model.decoding.state_size import published_settings, state_size
from lolcats_core.model.forward import causal_logits, evaluating, rows_per_forward
from lolcats_core.model.map_files import INITIAL, NOT_OF_MAPS, load_feature_maps, save_feature_maps
from lolcats_core.model.modeling import feature_maps, linearize
from lolcats_core.training.attention_transfer import Errors, attention_transfer, head_errors
from lolcats_core.training.loop import Rows, total_steps
from lolcats_core.training.losses import plain_model
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.perplexity import next_token_targets, perplexity
from lolcats_core.training.selection import select

logger = logging.getLogger(__name__)
# What a recipe decides; everything else of params.yaml is the same for all.
SECTIONS = ("linearize", "transfer", "select", "finetune")
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Measures:
    """What each model is measured on. `context`: tokens at which the size of the decode state is told."""

    batch_size: int = 8
    perplexity_rows: int = 64
    recall_gaps: tuple[int, ...] = (200, 400, 900)
    recall_samples: int = 24
    generation_prompts: int = 16
    generation_tokens: int = 64
    audit_rows: int = 16
    context: int = 8192


@dataclass(frozen=True)
class Recipe:
    """A name and the sections of params.yaml that make it."""

    name: str
    params: Params

    @classmethod
    def of(cls, name: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
        """From plain values: `overrides` laid over `defaults`, and both over the published recipe.

        Raises:
            UserError: a section or a key that a recipe does not have, or a value that breaks its constraint.
        """
        values = apply_overrides(dict(defaults), dict(overrides))
        for section in values:
            if section not in SECTIONS:
                raise UserError(f"recipe {name!r}: sections are {', '.join(SECTIONS)}, got {section!r}")
        return cls(name, params_from_dict(values, source=f"recipe {name!r}"))

    def sections(self) -> dict[str, Any]:
        """Every value that decides the result."""
        return {section: dataclasses.asdict(getattr(self.params, section)) for section in SECTIONS}

    def tokens(self, rows: Rows) -> int:
        """Training tokens of both stages."""
        stages: tuple[TrainingParams, ...] = (self.params.transfer, self.params.finetune)
        return sum(
            total_steps(len(rows), stage) * stage.batch_size * stage.gradient_accumulation * int(rows.sequence_length)
            for stage in stages
        )


@dataclass(frozen=True)
class Bench:
    """What all recipes share.

    Attributes:
        teacher: frozen; its weights are in every student.
        folder: of finished rows and of the feature maps that rows share.
        exclude_ids: tokens that recall strings never hold.
    """

    teacher: PreTrainedModel
    train_rows: Rows
    validation_rows: Rows
    measures: Measures
    folder: Path
    exclude_ids: tuple[int, ...] = ()

    @cached_property
    def identity(self) -> str:
        """Of the teacher, the text and the measures: a kept row of another bench is not taken."""
        texts = [getattr(rows, "digest", None) for rows in (self.train_rows, self.validation_rows)]
        return sha256_json([model_hash(self.teacher), texts, dataclasses.asdict(self.measures)])

    def file(self, recipe: Recipe, seed: int, finetune: bool = True) -> Path:
        """Where the row is kept: whatever decides it is in the name."""
        key = sha256_json([self.identity, recipe.sections(), seed, finetune])[:16]
        return self.folder / f"row-{key}.json"

    @cached_property
    def teacher_row(self) -> dict[str, Any]:
        """The teacher's own `measured`, kept like a row."""
        file = self.folder / f"teacher-{self.identity[:16]}.json"
        if not file.is_file():
            write_json(file, measured(self.teacher, self))
        return dict(json.loads(file.read_text(encoding="utf-8")))

    @cached_property
    def teacher_writing(self) -> list[list[int]]:
        """The teacher's continuations, which every student's are compared with."""
        ids = generation.prompts(self.validation_rows, self.measures.generation_prompts, PROMPT_TOKENS)
        return generation.continue_greedily(self.teacher, ids, self.measures.generation_tokens)[0]


def run(recipe: Recipe, bench: Bench, seed: int, *, finetune: bool = True) -> dict[str, Any]:
    """Train and measure one recipe; a finished one is read.

    Args:
        finetune: also stage 2; without it the row ends after stage 1 and selection.

    Returns:
        Plain values: ``recipe``, ``seed``, ``selection``, ``transferred`` and, with `finetune`, ``finetuned`` (each of
        `measured`), ``tokens`` and ``seconds`` by step.

    Raises:
        UserError: the recipe does not fit the teacher, or training diverged.
    """
    file = bench.file(recipe, seed, finetune)
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    started = time.monotonic()
    seed_everything(seed)
    student, errors, transfer_seconds = transferred(recipe, bench, seed)
    chosen = recipe.params.select
    kept, selection = select(bench.teacher, student, bench.validation_rows, chosen, errors=errors, seed=seed)
    selected = time.monotonic()
    row: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": seed,
        "selection": selection.to_dict(chosen),
        "transferred": measured(kept, bench, whole=not finetune),
        "tokens": recipe.tokens(bench.train_rows),
    }
    seconds = {"transfer": transfer_seconds, "select": max(0.0, selected - started - transfer_seconds)}
    if finetune:
        with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
            training = recipe.params.finetune
            adapted, result = low_rank_finetune(
                kept, bench.train_rows, bench.validation_rows, training, scratch=Path(scratch), seed=seed
            )
        seconds["finetune"] = result.seconds
        row["finetuned"] = measured(plain_model(adapted), bench)
    row["seconds"] = {**seconds, "all": time.monotonic() - started}
    write_json(file, row)
    return row


def transferred(recipe: Recipe, bench: Bench, seed: int) -> tuple[PreTrainedModel, Errors, float]:
    """A student after attention transfer, what its heads missed, and the seconds it took, here or earlier."""
    params = recipe.params.transfer
    student = linearize(bench.teacher, recipe.params.linearize, seed=seed)
    sections = recipe.sections()
    made = {name: value for name, value in sections["linearize"].items() if name not in NOT_OF_MAPS or name in INITIAL}
    key = sha256_json([bench.identity, made, sections["transfer"], seed])[:16]
    maps, notes = bench.folder / f"maps-{key}.safetensors", bench.folder / f"maps-{key}.json"
    if notes.is_file() and maps.is_file():
        load_feature_maps(student, maps)
        found = json.loads(notes.read_text(encoding="utf-8"))
        return student, {int(layer): each for layer, each in found["errors"].items()}, found["seconds"]
    seconds = 0.0
    if params.enabled and feature_maps(student):
        with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
            result = attention_transfer(
                student, bench.train_rows, bench.validation_rows, params, scratch=Path(scratch), seed=seed
            )
        seconds = result.seconds
    count = min(len(bench.validation_rows), params.max_eval_rows or bench.measures.perplexity_rows)
    errors = head_errors(student, bench.validation_rows, count, params.batch_size) if feature_maps(student) else {}
    save_feature_maps(student, maps)
    write_json(notes, {"errors": errors, "seconds": seconds})
    return student, errors, seconds


def measured(model: PreTrainedModel, bench: Bench, *, whole: bool = True) -> dict[str, Any]:
    """Perplexity and recall of a model and, with `whole`, its agreement with the teacher, audit and state.

    Returns:
        ``perplexity``, ``recall`` by gap; ``agreement`` (share of positions where the most probable token is the
        teacher's), ``exact_prefix`` (share of a continuation written like the teacher's from its start), ``token_f1``,
        ``linear_off`` and ``window_off`` (perplexities; None where there is no such branch or the loss is not finite),
        and ``state`` (`state_bytes`).
    """
    measures, rows = bench.measures, bench.validation_rows
    found: dict[str, Any] = {"perplexity": _perplexity(model, bench, measures.perplexity_rows)}
    recalls = copy_recall(
        model,
        bench.teacher.config.vocab_size,
        measures.recall_gaps,
        measures.recall_samples,
        0,
        measures.batch_size,
        exclude_ids=bench.exclude_ids,
    )
    found["recall"] = {str(gap): result.value for gap, result in recalls.items()}
    if not whole:
        return found
    found["state"] = state_bytes(model, bench)
    if model is bench.teacher:
        return found
    found["agreement"] = agreement(bench.teacher, model, rows, measures.audit_rows, measures.batch_size)
    ids = generation.prompts(rows, measures.generation_prompts, PROMPT_TOKENS)
    writing, _ = generation.continue_greedily(model, ids, measures.generation_tokens)
    compared = generation.compare_writing(bench.teacher_writing, writing, ())
    found["exact_prefix"] = compared["exact_prefix"]["value"] / measures.generation_tokens
    found["token_f1"] = compared["token_f1"]["value"]
    maps = list(feature_maps(model).values())
    for branch in ("linear", "window"):
        with without_branch(maps, cast(Any, branch)):
            found[f"{branch}_off"] = _perplexity(model, bench, measures.audit_rows) if maps else None
    found["audited"] = _perplexity(model, bench, measures.audit_rows)
    return found


def _perplexity(model: nn.Module, bench: Bench, rows: int) -> float | None:
    try:
        batch_size = bench.measures.batch_size
        return perplexity(model, bench.validation_rows, batch_size=batch_size, max_rows=rows).perplexity
    except UserError as error:
        logger.warning("%s", error)
        return None


def agreement(teacher: nn.Module, student: nn.Module, rows: Rows, count: int, batch_size: int) -> float:
    """Share of counted positions at which both models' most probable next token is the same one."""
    device = next(student.parameters()).device
    same, total = 0, 0
    step = rows_per_forward(batch_size, rows.sequence_length, cast(Any, teacher).config.vocab_size)
    with evaluating(teacher), evaluating(student):
        for start in range(0, min(count, len(rows)), step):
            indices = range(start, min(start + step, count, len(rows)))
            batch = {name: value.to(device) for name, value in rows.batch(indices).items()}
            _, counted = next_token_targets(batch)
            first, second = (
                causal_logits(model, batch["input_ids"], batch.get("position_ids"))[:, :-1].argmax(-1)
                for model in (teacher, student)
            )
            same += int((first == second)[counted].sum())
            total += int(counted.sum())
    return same / max(total, 1)


def state_bytes(model: PreTrainedModel, bench: Bench) -> dict[str, float]:
    """Size of one sequence's decode state (`state_size`).

    Returns:
        ``constant`` and ``per_token`` bytes, ``bytes`` of both at `Measures.context` tokens, its ``share`` of the
        teacher's kv cache at that length, and ``over_published``, the ratio to the published recipe's state.
    """
    config, context = cast(Any, model).config, bench.measures.context
    teacher = LinearizeConfig(softmax_layers=tuple(range(config.num_hidden_layers)))
    settings = LinearizeConfig.from_dict(config.linearize) if hasattr(config, "linearize") else teacher
    size, whole, published = (
        state_size(config, each, bench.teacher.dtype) for each in (settings, teacher, published_settings(config))
    )
    return {
        "constant": size.linear + size.exact,
        "per_token": size.per_token,
        "bytes": size.at(context),
        "share": size.at(context) / whole.at(context),
        "over_published": size.at(context) / published.at(context),
    }


def budgets(base: Recipe, ratios: Iterable[float]) -> list[Recipe]:
    """`base` at several cache ratios; 0 is `base` without any kept head."""
    found = []
    for ratio in sorted(set(ratios)):
        chosen = dataclasses.replace(base.params.select, softmax_budget={"cache_ratio": ratio} if ratio else None)
        found.append(Recipe(f"{ratio:.3g}", dataclasses.replace(base.params, select=chosen)))
    return found


def exclude_ids(config: Any, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Special tokens that a model's configuration names, and `extra`."""
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    ids: set[int] = {*extra}
    for value in named:
        ids |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    return tuple(sorted(ids))

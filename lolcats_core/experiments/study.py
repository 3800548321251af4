"""What all trials of a study share, and the measurements of one of its models."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedModel

from lolcats_common.errors import DivergedError, UserError
from lolcats_common.files import sha256_file, sha256_json, write_json
from lolcats_common.import_closure import import_closure
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import Params
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.data.rows import open_split
from lolcats_core.data.special_tokens import special_ids
from lolcats_core.evaluation import generation
from lolcats_core.evaluation.needles import Needle, make_needles, needles_found
from lolcats_core.evaluation.position import joined_rows, loss_by_position, position_losses
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.evaluation.results import model_hash
from lolcats_core.model.branches import without_branch
from lolcats_core.model.decoding.state_size import published_settings, state_size, teacher_size
from lolcats_core.model.forward import causal_logits, evaluating, rows_per_forward
from lolcats_core.model.modeling import feature_maps
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.loop import Rows
from lolcats_core.training.perplexity import next_token_targets, perplexity

logger = logging.getLogger(__name__)
PROMPT_TOKENS = 128
# The module whose imports are all the code that decides a trial's result.
ENGINE = "lolcats_core.experiments.trials"


@dataclass(frozen=True)
class EvalSettings:
    """What each model is measured on.

    Without `generation_prompts`, `audit_rows`, `long_rows` or `needle_lengths` the measurements that need them are left
    out. `context`: number of tokens for which the size of the decode state is given, and of the long rows whose loss is
    measured by position. `recall_seed`: which random strings recall shows. `needle_lengths`: tokens of texts that hide
    a number (`evaluation.needles`), `needle_samples` of each.
    """

    batch_size: int = 8
    perplexity_rows: int = 64
    recall_gaps: tuple[int, ...] = (200, 400, 900)
    recall_samples: int = 24
    generation_prompts: int = 16
    generation_tokens: int = 64
    audit_rows: int = 16
    context: int = 8192
    recall_seed: int = 0
    long_rows: int = 0
    needle_lengths: tuple[int, ...] = ()
    needle_samples: int = 40


@dataclass(frozen=True)
class StudyContext:
    """What all trials of a study share.

    Attributes:
        teacher: frozen; its weights are in every student.
        folder: holds finished trials and the feature maps that trials share; several studies may use one.
        exclude_ids: tokens that recall strings never hold.
        tokenizer: the teacher's, for selection by retrieval and needles.
    """

    teacher: PreTrainedModel
    train_rows: Rows
    validation_rows: Rows
    settings: EvalSettings
    folder: Path
    exclude_ids: tuple[int, ...] = ()
    tokenizer: Any = None

    @classmethod
    def open(cls, pin: Path, rows: Path, params: Params, settings: EvalSettings, folder: Path) -> StudyContext:
        """The study of a pinned teacher (`Teacher`) and the token rows in `rows`/train and /validation.

        Raises:
            UserError: the teacher or the rows are missing or damaged, or the device does not exist.
        """
        source = Teacher.open(pin)
        tokenizer = source.tokenizer()
        teacher = source.load(resolve_dtype(params.compute.precision), resolve_device(params.compute.device))
        train, validation = open_split(rows)
        excluded = exclude_ids(teacher.config, special_ids(tokenizer))
        return cls(teacher, train, validation, settings, folder, excluded, tokenizer)

    @cached_property
    def inputs(self) -> str:
        """Hash of the teacher, the text and the code, which decide every result."""
        texts = [getattr(rows, "digest", None) for rows in (self.train_rows, self.validation_rows)]
        closure = import_closure(ENGINE, root=Path(__file__).parents[2])
        code = {module: sha256_file(file) for module, file in closure.items()}
        return sha256_json([model_hash(self.teacher), texts, code])

    @cached_property
    def measurement(self) -> list[Any]:
        """Plain values that decide what a model's measurements are."""
        return [dataclasses.asdict(self.settings), self.exclude_ids]

    def file(self, name: str, *decided_by: Any) -> Path:
        """Where a result is kept that `inputs` and these plain values decide; the folder is made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}-{sha256_json([self.inputs, *decided_by])[:16]}.json"

    @cached_property
    def teacher_row(self) -> dict[str, Any]:
        """The teacher's own measurements (`evaluate_model`), kept like a trial's."""
        file = self.file("teacher", self.measurement)
        if not file.is_file():
            write_json(file, evaluate_model(self.teacher, self))
        return dict(json.loads(file.read_text(encoding="utf-8")))

    @cached_property
    def needles(self) -> dict[int, list[Needle]]:
        """Items of each length, the same for every model.

        Raises:
            UserError: there is no tokenizer, or the text is too short.
        """
        if self.tokenizer is None:
            raise UserError("`measures.needle_lengths` needs the teacher's tokenizer, got none")
        settings, rows = self.settings, self.validation_rows
        return {
            length: make_needles(rows, self.tokenizer, length, settings.needle_samples, settings.recall_seed)
            for length in settings.needle_lengths
        }

    @cached_property
    def teacher_continuations(self) -> list[list[int]]:
        """The teacher's greedy continuations, which every student's are compared with."""
        return _continuations(self.teacher, self)


def evaluate_model(model: PreTrainedModel, study: StudyContext, *, full: bool = True) -> dict[str, Any]:
    """Measure perplexity and recall of a model and, with `full`, its agreement with the teacher, branches and state.

    Returns:
        ``perplexity``, ``recall`` by gap; with `full` ``state`` (`state_bytes`), ``row_losses`` (nats, of each of the
        rows whose perplexity it is), ``positions`` (loss of long rows, by `position.loss_by_position`),
        ``long_losses`` (of each long row, in the last of those ranges), ``needles`` (found or not, by length) and, of a
        student, ``agreement`` (share
        of positions where the most probable token is the teacher's), ``exact_prefix`` (share of a continuation that is
        the teacher's from its start on), ``token_f1``, ``audited`` (perplexity on `audit_rows`), ``linear_off`` and
        ``window_off`` (the same without a branch; None where there is no such branch or the loss is not finite).

    Raises:
        DivergedError: the loss is not finite.
    """
    settings, rows = study.settings, study.validation_rows
    result: dict[str, Any] = {"perplexity": _perplexity(model, study, settings.perplexity_rows)}
    recalls = copy_recall(
        model,
        study.teacher.config.vocab_size,
        settings.recall_gaps,
        settings.recall_samples,
        settings.recall_seed,
        settings.batch_size,
        exclude_ids=study.exclude_ids,
    )
    result["recall"] = {str(gap): recall.value for gap, recall in recalls.items()}
    if not full:
        return result
    result["state"] = state_bytes(model, study)
    each = position_losses(model, rows.batch(range(min(settings.perplexity_rows, len(rows)))))
    result["row_losses"] = each.nanmean(1).tolist()
    if settings.long_rows:
        losses = position_losses(model, joined_rows(rows, settings.context, settings.long_rows))
        result["positions"] = loss_by_position(losses)
        result["long_losses"] = losses[:, result["positions"][-1]["start"] - 1 :].nanmean(1).tolist()
    if settings.needle_lengths:
        result["needles"] = {str(length): needles_found(model, needles) for length, needles in study.needles.items()}
    if model is study.teacher:
        return result
    if settings.generation_prompts:
        compared = generation.compare_writing(study.teacher_continuations, _continuations(model, study), ())
        result["exact_prefix"] = compared["exact_prefix"]["value"] / settings.generation_tokens
        result["token_f1"] = compared["token_f1"]["value"]
    if settings.audit_rows:
        result["agreement"] = agreement(study.teacher, model, rows, settings.audit_rows, settings.batch_size)
        result["audited"] = _perplexity(model, study, settings.audit_rows)
        branches: tuple[Literal["linear", "window"], ...] = ("linear", "window")
        for branch in branches:
            result[f"{branch}_off"] = _perplexity_without(branch, model, study)
    return result


def _perplexity(model: nn.Module, study: StudyContext, rows: int) -> float:
    batch_size = study.settings.batch_size
    return perplexity(model, study.validation_rows, batch_size=batch_size, max_rows=rows).perplexity


def _perplexity_without(branch: Literal["linear", "window"], model: nn.Module, study: StudyContext) -> float | None:
    maps = list(feature_maps(model).values())
    if not maps:
        return None
    try:
        with without_branch(maps, branch):
            return _perplexity(model, study, study.settings.audit_rows)
    except DivergedError as error:
        logger.warning("without the %s branch: %s", branch, error)
        return None


def _continuations(model: PreTrainedModel, study: StudyContext) -> list[list[int]]:
    ids = generation.prompts(study.validation_rows, study.settings.generation_prompts, PROMPT_TOKENS)
    return generation.continue_greedily(model, ids, study.settings.generation_tokens)[0]


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


def state_bytes(model: PreTrainedModel, study: StudyContext) -> dict[str, float]:
    """Size of one sequence's decode state (`state_size`).

    Returns:
        ``constant`` and ``per_token`` bytes, ``bytes`` of both at `EvalSettings.context` tokens, its ``share`` of the
        teacher's kv cache at that length, and ``over_published``, the ratio to the published recipe's state.
    """
    config, context, dtype = cast(Any, model).config, study.settings.context, study.teacher.dtype
    whole, published = teacher_size(config, dtype), state_size(config, published_settings(config), dtype)
    size = whole
    if hasattr(config, "linearize"):
        size = state_size(config, LinearizeConfig.from_dict(config.linearize), dtype)
    return {
        "constant": size.linear + size.exact,
        "per_token": size.per_token,
        "bytes": size.at(context),
        "share": size.at(context) / whole.at(context),
        "over_published": size.at(context) / published.at(context),
    }


def exclude_ids(config: Any, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Special tokens that a model's configuration names, and `extra`."""
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    ids: set[int] = {*extra}
    for value in named:
        ids |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    return tuple(sorted(ids))

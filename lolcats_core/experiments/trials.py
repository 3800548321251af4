"""Trials: whole recipes trained and measured side by side on one teacher and the same rows of text.

A trial is stage 1, selection and stage 2 with settings of its own. Trials with the same stage 1 share it, a finished
trial is read instead of repeated, a killed one continues from its checkpoint, and several processes over one folder
share the work.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from lolcats_common.errors import DivergedError, UserError
from lolcats_common.files import write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import Params, apply_overrides, params_from_dict
from lolcats_common.training_params import FinetuneParams, SelectParams, TransferParams
from lolcats_core.compute.device import seed_everything
from lolcats_core.evaluation.control import control_settings
from lolcats_core.experiments.controls import TEACHER, WINDOW
from lolcats_core.experiments.study import StudyContext, evaluate_model
from lolcats_core.model.map_files import INITIAL, NOT_OF_MAPS, load_feature_maps, save_feature_maps
from lolcats_core.model.modeling import feature_maps, linearize
from lolcats_core.training.allocation import all_groups
from lolcats_core.training.attention_transfer import attention_transfer, evaluate_transfer, head_errors
from lolcats_core.training.loop import Rows, total_steps
from lolcats_core.training.losses import plain_model
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.ranking.criteria import NEEDS_TEACHER
from lolcats_core.training.ranking.retrieval import retrieval_of
from lolcats_core.training.selection import select

logger = logging.getLogger(__name__)
# The sections of params.yaml that a trial decides; everything else is the same for all.
SECTIONS = ("linearize", "transfer", "select", "finetune")


@dataclass(frozen=True)
class Trial:
    """A named recipe and its seed. Without `finetune` the trial ends after selection."""

    name: str
    linearize: LinearizeConfig
    transfer: TransferParams
    select: SelectParams
    finetune: FinetuneParams | None
    seed: int = 0

    @classmethod
    def of(cls, name: str, params: Params) -> Trial:
        """The recipe of a project's parameters."""
        return cls(name, params.linearize, params.transfer, params.select, params.finetune, params.seed)

    @classmethod
    def from_overrides(cls, name: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Trial:
        """The recipe of plain values: `overrides` laid over `defaults`, and both over the published recipe.

        Raises:
            UserError: a section or a key that a recipe does not have, or a value that breaks its constraint.
        """
        values = apply_overrides(dict(defaults), dict(overrides))
        for section in values:
            if section not in SECTIONS:
                raise UserError(f"recipe {name!r}: sections are {', '.join(SECTIONS)}, got {section!r}")
        return cls.of(name, params_from_dict(values, source=f"recipe {name!r}"))

    def values(self) -> dict[str, Any]:
        """Plain values of everything that decides the result; the name does not."""
        values = dataclasses.asdict(self) | {"linearize": self.linearize.to_dict()}
        del values["name"]
        return values

    def tokens(self, rows: Rows) -> int:
        """Training tokens of the stages that run."""
        stages = [self.transfer if self.transfer.enabled else None, self.finetune]
        return sum(
            total_steps(len(rows), stage) * stage.batch_size * stage.gradient_accumulation * int(rows.sequence_length)
            for stage in stages
            if stage is not None
        )


def cache_budgets(base: Trial, ratios: Iterable[float]) -> list[Trial]:
    """`base` at several cache ratios; 0 is `base` without any kept head."""
    budgets = {ratio: {"cache_ratio": ratio} if ratio else None for ratio in sorted(set(ratios))}
    return [
        dataclasses.replace(
            base, name=f"{ratio:.3g}", select=dataclasses.replace(base.select, softmax_budget=budget, cache_budget=None)
        )
        for ratio, budget in budgets.items()
    ]


def controls_of(trial: Trial, result: Mapping[str, Any], study: StudyContext) -> dict[str, Trial]:
    """The controls of a finished trial, by `WINDOW` and `TEACHER`; none where nothing is linear or it diverged.

    The window's bytes are counted at `EvalSettings.context` tokens. A teacher that learns from its own logits alone
    stays what it is and is left out.
    """
    if result["selection"] is None:
        return {}
    config, settings = study.teacher.config, LinearizeConfig.from_dict(result["selection"]["linearize"])
    window = control_settings(config, settings, study.teacher.dtype, study.settings.context)
    if window is None:
        return {}
    plain = dataclasses.replace(trial, transfer=TransferParams(enabled=False), select=SelectParams())
    found = {WINDOW: dataclasses.replace(plain, name=f"{trial.name}, {WINDOW}", linearize=window)}
    if trial.finetune is not None and trial.finetune.loss != "logit_kl":
        layers = tuple(dict.fromkeys(layer for layer, _ in all_groups(config)))
        name = f"{trial.name}, {TEACHER}"
        found[TEACHER] = dataclasses.replace(plain, name=name, linearize=LinearizeConfig(softmax_layers=layers))
    return found


def run_trials(
    trials: Sequence[Trial],
    study: StudyContext,
    note: Callable[[Trial, dict[str, Any]], None] = lambda trial, result: None,
) -> list[dict[str, Any]]:
    """Train and measure every trial and its controls; first those that no other process works on, then the others.

    Args:
        note: called with each trial or control and its result as they come.

    Returns:
        The results (`run_trial`) in the order of `trials`, each with those of its ``controls`` (`controls_of`).

    Raises:
        UserError: a recipe does not fit the teacher.
    """
    results = _run_all(trials, study, note)
    controls = [controls_of(trial, result, study) for trial, result in zip(trials, results, strict=True)]
    different = {_file(each, study): each for found in controls for each in found.values()}
    _run_all(list(different.values()), study, note)
    return [cast(dict[str, Any], finished_with_controls(trial, study)) for trial in trials]


def _run_all(
    trials: Sequence[Trial], study: StudyContext, note: Callable[[Trial, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    results: dict[int, dict[str, Any]] = {}
    for wait in (False, True):
        for number, trial in enumerate(trials):
            if number not in results and (result := run_trial(trial, study, wait=wait)) is not None:
                results[number] = result
                logger.info("%d of %d trials: %s", len(results), len(trials), trial.name)
                note(trial, result)
    return [results[number] for number in range(len(trials))]


def run_trial(trial: Trial, study: StudyContext, *, wait: bool = True) -> dict[str, Any] | None:
    """Train and measure one trial; the result is kept as JSON in the study's folder.

    Args:
        wait: for another process that works on this trial; otherwise None is returned then.

    Returns:
        Plain values: ``recipe`` (the name), ``seed``, ``tokens``, ``seconds`` by step, ``layer_errors`` (mean squared
        error of each linearized layer after stage 1), ``selection`` (`Selection.to_dict`), and the measurements
        ``transferred`` and, with stage 2, ``finetuned`` (`evaluate_model`). A measurement that divergence prevented is
        None, and ``diverged`` says what happened.

    Raises:
        UserError: the recipe does not fit the teacher.
    """
    file = _file(trial, study)
    try:
        with FileLock(file.with_suffix(".lock"), blocking=wait):
            if not file.is_file():
                write_json(file, _train_and_measure(trial, study, scratch=file.with_suffix("")))
    except Timeout:
        return None
    return finished(trial, study)


def finished(trial: Trial, study: StudyContext) -> dict[str, Any] | None:
    """The result of a trial that some process has finished; otherwise None."""
    file = _file(trial, study)
    return {"recipe": trial.name, **json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else None


def finished_with_controls(trial: Trial, study: StudyContext) -> dict[str, Any] | None:
    """As `finished`, with those of its ``controls`` that are finished as well, by what they are (`controls_of`)."""
    result = finished(trial, study)
    if result is None:
        return None
    found = {kind: finished(each, study) for kind, each in controls_of(trial, result, study).items()}
    return {**result, "controls": {kind: each for kind, each in found.items() if each is not None}}


def _file(trial: Trial, study: StudyContext) -> Path:
    return study.file("trial", trial.values(), study.measurement)


def _train_and_measure(trial: Trial, study: StudyContext, scratch: Path) -> dict[str, Any]:
    started = time.monotonic()
    seed_everything(trial.seed)
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {
        "seed": trial.seed,
        "tokens": trial.tokens(study.train_rows),
        "seconds": seconds,
        "layer_errors": {},
        "selection": None,
        "transferred": None,
    }
    if trial.finetune is not None:
        result["finetuned"] = None
    try:
        student, transfer = _transferred(trial, study)
        seconds["transfer"] = transfer["seconds"]
        result["layer_errors"] = transfer["layer_errors"]
        begun = time.monotonic()
        errors = {int(layer): values for layer, values in transfer["errors"].items()}
        retrieval = None
        if trial.select.chooses and trial.select.criterion in NEEDS_TEACHER:
            retrieval = retrieval_of(study.teacher, study.train_rows, study.tokenizer, trial.select, trial.seed)
        selected, selection = select(
            study.teacher,
            student,
            study.validation_rows,
            trial.select,
            errors=errors,
            seed=trial.seed,
            retrieval=retrieval,
        )
        seconds["select"] = time.monotonic() - begun
        result["selection"] = selection.to_dict(trial.select)
        result["transferred"] = evaluate_model(selected, study, full=trial.finetune is None)
        if trial.finetune is not None:
            adapted, tuned = low_rank_finetune(
                selected, study.train_rows, study.validation_rows, trial.finetune, scratch=scratch, seed=trial.seed
            )
            seconds["finetune"] = tuned.seconds
            result["finetuned"] = evaluate_model(plain_model(adapted), study)
    except DivergedError as error:
        logger.warning("%s diverged: %s", trial.name, error)
        result["diverged"] = str(error)
    seconds["all"] = time.monotonic() - started
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def _transferred(trial: Trial, study: StudyContext) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student after stage 1, which trials with the same settings share.

    Returns:
        The student, and the plain values ``errors`` (`Errors`), ``layer_errors`` by layer, and ``seconds`` of training.
    """
    params, rows = trial.transfer, study.validation_rows
    student = linearize(study.teacher, trial.linearize, seed=trial.seed)
    if not feature_maps(student):
        return student, {"errors": {}, "layer_errors": {}, "seconds": 0.0}
    settings = trial.linearize.to_dict()
    made = {name: value for name, value in settings.items() if name not in NOT_OF_MAPS or name in INITIAL}
    count = min(len(rows), params.max_eval_rows or study.settings.perplexity_rows)
    notes = study.file("transfer", made, dataclasses.asdict(params), trial.seed, count)
    maps, scratch = notes.with_suffix(".safetensors"), notes.with_suffix("")
    with FileLock(notes.with_suffix(".lock")):
        if not notes.is_file():  # it is written last
            seconds = 0.0
            if params.enabled:
                result = attention_transfer(student, study.train_rows, rows, params, scratch=scratch, seed=trial.seed)
                seconds = result.seconds
            losses = evaluate_transfer(student, rows, dataclasses.replace(params, max_eval_rows=count), student.device)
            if not math.isfinite(losses.pop("loss")):
                raise DivergedError("the loss of attention transfer is not finite on the validation rows")
            layer_errors = {str(int(name.removeprefix("layer_"))): value for name, value in losses.items()}
            errors = head_errors(student, rows, count, params.batch_size)
            save_feature_maps(student, maps)
            write_json(notes, {"errors": errors, "layer_errors": layer_errors, "seconds": seconds})
            shutil.rmtree(scratch, ignore_errors=True)
    load_feature_maps(student, maps)
    return student, json.loads(notes.read_text(encoding="utf-8"))

"""What stage `evaluate` measures: each number once, kept as JSON, the same for every step's model.

Two layers of memory: the stage's scratch directory makes a killed stage continue, and the project's result cache, keyed
by the model's hash, the task's hash and all settings, spares later runs what an earlier one measured (the teacher's
tasks above all).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from lolcats_common.files import sha256_json, write_json, write_text
from lolcats_common.progress import progress
from lolcats_common.records import Audit, Control, Measured, Positions, StateBytes
from lolcats_core import LinearizeConfig
from lolcats_core.data.rows import open_split
from lolcats_core.data.special_tokens import begin_ids, special_ids
from lolcats_core.evaluation import audit, code_continuation, control, generation, position, synthetic
from lolcats_core.evaluation.harness import run_lm_eval, task_hash
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.evaluation.results import ResultCache
from lolcats_core.model.decoding.state_size import state_facts, state_size
from lolcats_core.training.perplexity import bigram_perplexity
from tasks.measurements import models
from tasks.runner.artifacts import selected
from tasks.runner.stage import Stage

logger = logging.getLogger(__name__)
PROMPT_TOKENS = 128
# What needs a model that is there as a whole, by its parameter, and the value that leaves it out.
NEEDS_WHOLE = {"recall_gaps": (), "tasks": (), "long_rows": 0, "generation_prompts": 0, "audit_rows": 0}


class Measurements:
    """Every measurement by name; `step` is that of a model (`Models.get`).

    Attributes:
        params: what can be measured here; `left_out` names the parameters of what cannot, in models that do not fit.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.params = stage, stage.params.evaluate
        self.train_rows, self.rows = open_split(stage.input("prepare"))
        self.models = models.Models(stage, int(self.rows.sequence_length))
        self.left_out: list[str] = []
        if self.models.by_layer:
            self.left_out = [name for name, nothing in NEEDS_WHOLE.items() if getattr(self.params, name) != nothing]
            self.params = replace(self.params, **NEEDS_WHOLE)  # type: ignore[arg-type]
            text = (
                "the models do not fit %s: perplexity goes layer by layer, and what needs a whole model is left out: %s"
            )
            logger.warning(text, self.models.device.type, ", ".join(self.left_out) or "nothing")
        self.tokenizer = self.models.teacher.tokenizer()
        # At once: lm-eval gives a tokenizer without one a padding token.
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        # This file says what is asked: which prompts, lengths and tokens. The settings are in each key.
        self.cache = ResultCache(stage.results, [Path(__file__), Path(models.__file__)])
        self.task_dir = stage.scratch / "lm_eval_tasks"

    def kept(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> Any:
        """The result of `measure`, from the scratch directory where an earlier, cut-short run left it whole."""
        file = self.stage.scratch / "measured" / f"{name}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError):
            logger.warning("%s is damaged; measured again", file)
        result = measure()
        write_json(file, result)
        return result

    def cached(
        self, step: str, name: str, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> Any:
        """As `kept`, and from the result cache where this very model was measured before under the same settings."""

        def look_up() -> dict[str, Any]:
            key = {"model": self.models.hash(step), "rows": self.rows.digest, "seed": self.stage.params.seed}
            return self.cache.get(name, {**key, **settings}, measure)

        return self.kept(f"{name}-{step}", look_up)

    def state(self) -> StateBytes:
        """Bytes that the student's decoding holds for one sequence: `state_facts`."""
        config: Any = AutoConfig.from_pretrained(self.stage.input("finetune") / "model")
        return state_facts(config, LinearizeConfig.from_dict(config.linearize), self.models.dtype)

    def bigram(self) -> dict[str, Any]:
        """The baseline, counted on the training rows."""
        vocab_size, max_rows = self.rows.vocab_size, self.params.max_perplexity_rows
        return self.kept(
            "perplexity-bigram",
            lambda: vars(bigram_perplexity(self.train_rows, self.rows, vocab_size, max_rows=max_rows)),
        )

    def perplexity(self, step: str) -> dict[str, Any]:
        """Perplexity of one step's model on the validation rows."""

        def measure() -> dict[str, Any]:
            result = self.models.perplexity(step, self.rows)
            logger.info("perplexity of the %s model: %.4g", step, result.perplexity)
            return vars(result)

        if self.models.by_layer:  # a model's hash reads all of its weights
            return self.kept(f"perplexity-{step}", measure)
        return self.cached(step, "perplexity", {"max_rows": self.params.max_perplexity_rows}, measure)

    def recall(self, step: str, gap: int) -> dict[str, Any]:
        """Copying recall of one model at one gap."""

        def measure() -> dict[str, Any]:
            with progress(self.params.recall_samples, f"recall of the {step} model at gap {gap}") as bar:
                result = copy_recall(
                    self.models.get(step),
                    min(len(self.tokenizer), self.rows.vocab_size),
                    (gap,),
                    self.params.recall_samples,
                    self.stage.params.seed,
                    self.params.batch_size,
                    exclude_ids=special_ids(self.tokenizer),
                    prefix_ids=begin_ids(self.tokenizer),
                    on_samples=bar.update,
                )[gap]
            logger.info("recall of the %s model at gap %d: %.3f ± %.3f", step, gap, result.value, result.stderr)
            return vars(result)

        return self.cached(step, f"recall-{gap}", {"samples": self.params.recall_samples}, measure)

    def positions(self, step: str) -> Positions:
        """Loss by position in rows longer than those of training."""
        return self._positions(step)["positions"]

    def _positions(self, step: str) -> dict[str, Any]:
        """``positions`` as they are recorded, and the ``losses`` of single tokens behind them."""
        length = self.models.long_tokens

        def measure() -> Mapping[str, Any]:
            batch = position.joined_rows(self.rows, length, self.params.long_rows)
            count, tokens = batch["input_ids"].shape
            with progress(count, f"loss by position of the {step} model") as bar:
                losses = position.position_losses(self.models.get(step), batch, on_rows=bar.update)
            ranges = position.loss_by_position(losses)
            rounded = [[None if math.isnan(x) else round(x, 5) for x in row] for row in losses.tolist()]
            return {"positions": {"rows": count, "length": tokens, "ranges": ranges}, "losses": rounded}

        return self.cached(step, "positions", {"length": length, "count": self.params.long_rows}, measure)

    def measure_control(self) -> None:
        """Everything that is measured on the control's model, where there is one."""
        if self.models.control is not None and not self.models.by_layer:
            self.perplexity("control")
            for gap in self.params.recall_gaps:
                self.recall("control", gap)
            if self.params.long_rows:
                self.positions("control")

    def control(self) -> Control | None:
        """The student beside its control, after both were measured."""
        settings, teacher = self.models.control, self.models.teacher.config
        if settings is None or self.models.by_layer:
            return None
        student, tokens = selected(self.stage)[0], self.models.long_tokens
        sizes = [state_size(teacher, each, self.models.dtype).at(tokens) for each in (settings, student)]
        measured: Control = {
            "window": control.window_of(settings, student, teacher),
            "sinks": control.SINKS,
            "tokens": tokens,
            "bytes": sizes[0],
            "student_bytes": sizes[1],
            "trained": self.params.control == "trained",
            "perplexity": self.perplexity("control")["perplexity"],
            "recall": {str(gap): measured_value(self.recall("control", gap)) for gap in self.params.recall_gaps},
            "positions": None,
            "differences": [],
        }
        if self.params.long_rows:
            found, compared = self._positions("control"), self._positions("finetuned")
            measured["positions"] = found["positions"]
            measured["differences"] = control.loss_differences(compared["losses"], found["losses"])
        return measured

    def task(self, step: str, name: str) -> dict[str, Any]:
        """One lm-eval task on one model, with every item's answer."""
        own = name in synthetic.TASKS
        limit, fewshot = None if own else self.params.task_limit, self.params.num_fewshot.get(name)
        answers = self.stage.scratch / "answers" / f"{step}-{name}"

        def measure() -> dict[str, Any]:
            result = run_lm_eval(
                self.models.get(step),
                self.tokenizer,
                [name],
                limit=limit,
                num_fewshot=fewshot,
                batch_size=self.params.batch_size,
                task_dirs=[self.task_dir],
                label=f"{name} on the {step} model",
                answers=answers,
            )[name]
            logger.info("%s of the %s model on %s: %.4g ± %.2g", result.metric, step, name, result.value, result.stderr)
            return result.to_dict()

        def find_hash() -> dict[str, Any]:
            return {"hash": task_hash(name, num_fewshot=fewshot, task_dirs=[self.task_dir])}

        def look_up() -> dict[str, Any]:
            task = self.kept(f"task-hash-{name}", find_hash)
            key = {"model": self.models.hash(step), "task": task["hash"], "limit": limit, "num_fewshot": fewshot}
            return self.cache.get(f"task-{name}", {**key, "tokenizer": self.tokenizer_hash}, measure)

        return self.kept(f"task-{name}-{step}", look_up)

    def generations(self, step: str) -> dict[str, Any]:
        """Greedy continuations of the first rows, and what they cost; measured anew on every machine."""

        def measure() -> dict[str, Any]:
            ids = generation.prompts(self.rows, self.params.generation_prompts, PROMPT_TOKENS)
            logger.info("%s model: %d continuations of %d tokens", step, len(ids), self.params.generation_tokens)
            tokens, cost = generation.continue_greedily(self.models.get(step), ids, self.params.generation_tokens)
            return {"tokens": tokens, "cost": cost, "prompt_tokens": ids.shape[1]}

        return self.kept(f"generations-{step}", measure)

    def teacher_facts(self) -> dict[str, Any]:
        """``context`` (longest row, or None) and ``end`` (tokens that end a text), so that nothing else loads it."""

        def look() -> dict[str, Any]:
            teacher = self.models.get("teacher")
            context = getattr(teacher.config, "max_position_embeddings", None)
            return {"context": context, "end": generation.end_tokens(teacher, self.tokenizer)}

        return self.kept("teacher-facts", look)

    def audit(self, step: str) -> Audit:
        """The teacher's entropy, the error by head of the transferred model, or the branches of the finetuned one."""
        count, rows = self.params.audit_rows, self.rows

        def measure() -> Audit:
            logger.info("audit of the %s model", step)
            model = self.models.get(step)
            if step == "teacher":
                return {"entropy": audit.attention_entropy(model, rows, count)}
            if step == "transferred":
                return {"head_errors": audit.head_errors(model, rows, count)}
            off = audit.ablations(model, rows, batch_size=self.params.batch_size, max_rows=count)
            return {**off, "linear_mass": audit.linear_mass(model, rows, count)}

        # By step: the same model is asked different things at different steps.
        return self.cached(step, "audit", {"count": count, "step": step}, measure)

    def write_items(self) -> None:
        """Make the items of the project's own tasks, for lm-eval and beside the results."""
        chosen = {name for name in self.params.tasks if name in (*synthetic.TASKS, code_continuation.NAME)}
        haystack = ""
        if chosen & synthetic.IN_TEXT:
            haystack = synthetic.validation_text(self.rows, self.tokenizer, 2 * max(self.params.synthetic_lengths))
        for name in sorted(chosen):
            file = self.stage.scratch / f"{name}.jsonl"
            if name == code_continuation.NAME:
                count = self.params.task_limit or code_continuation.ITEMS
                made = code_continuation.make_items(self.rows, self.tokenizer, items=count, seed=self.stage.params.seed)
                code_continuation.write_task(made, file, self.task_dir)
            else:
                lengths, samples = self.params.synthetic_lengths, self.params.synthetic_samples
                items = synthetic.make_items(
                    name, self.tokenizer, lengths, samples, seed=self.stage.params.seed, haystack=haystack
                )
                synthetic.write_task(name, items, file, self.task_dir)
            write_text(self.stage.out / file.name, file.read_text(encoding="utf-8"))


def measured_value(result: Mapping[str, Any]) -> Measured:
    """The value and its standard error alone."""
    return {"value": result["value"], "stderr": result["stderr"]}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer makes of text; a model's hash does not know it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # How the last call padded and cut is no part of what it is.
    settings = {key: value for key, value in definition.items() if key not in ("padding", "truncation")}
    return sha256_json([settings, tokenizer.special_tokens_map])

"""lm-eval through its API: one model, some tasks, a result per task that can be paired with another model's."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats_common.errors import UserError
from lolcats_common.progress import Progress, progress
from lolcats_core.evaluation.recall import mean_and_stderr
from lolcats_core.evaluation.task_files import RUNS_ANSWERS, task_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# The metric by which results are published: length-normalised accuracy where the options are sentences.
PRIMARY = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "code_continuation": "acc_norm"}
# Longest text of an answer or a target in a sample log.
KEPT_CHARACTERS = 400


@dataclass(frozen=True)
class TaskResult:
    """One task (or group of tasks, pooled over items as MMLU is) on one model.

    Attributes:
        metric: the primary metric, such as ``acc``; `value` and `stderr` are its mean and standard error. That of a
            group is over all items alike, where lm-eval's own leaves out how its members differ.
        higher_is_better: false for perplexities.
        chance: what guessing reaches, from the number of options of each item; 0 where an answer is generated; None
            for metrics without such a floor (perplexities).
        metrics: every metric that lm-eval reports, by name.
        version: the task definition's version.
        hash: of the items, prompts and targets, as lm-eval hashes them; equal hashes were the same questions.
        samples: per item its ``id``, ``target``, ``responses`` (log-likelihoods, or the text), lm-eval's hash of the
            ``prompt``, and the primary metric's ``score`` (1.0 right, 0.0 wrong, for accuracies), or for a perplexity
            the ``loss`` in nats over ``weight`` units. Items of our own tasks carry their ``length`` and ``depth``.
    """

    name: str
    metric: str
    higher_is_better: bool
    chance: float | None
    value: float
    stderr: float
    items: int
    version: str
    hash: str
    metrics: dict[str, float]
    samples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def lm_eval_version() -> str:
    """The installed version of lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    task_dirs: Sequence[Path] = (),
    label: str = "lm-eval",
    answers: Path | None = None,
) -> dict[str, TaskResult]:
    """Run lm-eval tasks on a model that is already loaded.

    Only the folders that define the tasks are read (0.04 s instead of 14 s for all of lm-eval's). A task in
    `task_dirs` goes before one of lm-eval's own of the same name.

    Args:
        tasks: names of tasks or groups.
        limit: items per task; all by default.
        num_fewshot: examples before each question; by default what the task says.
        task_dirs: folders of further task definitions.
        label: what the progress shown calls this run.
        answers: a database of answered requests, of this very model: a run that was cut short asks only what is left.

    Raises:
        UserError: a task is unknown (the nearest name is given), or its data cannot be loaded.
    """
    paths = list(dict.fromkeys(task_folder(name, task_dirs) for name in tasks))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Measured(HFLM):
        bar: Progress | None = None

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            with progress(len(requests), label) as self.bar:
                return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            if self.bar is not None:
                self.bar.update(len(inps))
            return logits

    training = model.training
    with _quiet(), _one_process():
        manager = TaskManager(include_defaults=False, include_path=[str(path) for path in paths])
        groups = {name: _leaves(manager, name) for name in tasks}
        if answers is not None:
            answers.parent.mkdir(parents=True, exist_ok=True)
            _drop_damaged(answers)
        wrapped = Measured(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            backend="causal",
            softmax_dtype="float32",
        )
        try:
            answer = simple_evaluate(
                model=wrapped,
                tasks=list(dict.fromkeys(leaf for leaves in groups.values() for leaf in leaves.values())),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
                use_cache=None if answers is None else str(answers),
            )
        finally:
            model.train(training)
    assert answer is not None
    return {name: _result(name, leaves, dict(answer)) for name, leaves in groups.items()}


def _drop_damaged(answers: Path) -> None:
    """Delete databases of answers that can no longer be read; what stood in them is asked again."""
    for file in answers.parent.glob(f"{answers.name}_rank*.db"):
        try:
            with contextlib.closing(sqlite3.connect(file)) as database:
                whole = database.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.DatabaseError:
            whole = False
        if not whole:
            logger.warning("%s is damaged; asked again", file)
            file.unlink()


def task_hash(name: str, *, num_fewshot: int | None = None, task_dirs: Sequence[Path] = ()) -> str:
    """SHA-256 of a task's (or group's) definitions and documents, before any model has answered.

    Raises:
        UserError: as `run_lm_eval`.
    """
    from lm_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager(include_defaults=False, include_path=[str(task_folder(name, task_dirs))])
        leaves = _leaves(manager, name)
        digest = hashlib.sha256(f"{lm_eval_version()} {num_fewshot}".encode())
        for leaf, task in sorted(leaves.items()):
            # Where the definition and its documents lie is no part of what they are.
            places = ("dataset_kwargs", "metadata")
            config = {key: value for key, value in task.dump_config().items() if key not in places}
            config["version"] = str(task.VERSION)
            digest.update(f"{leaf} {json.dumps(config, sort_keys=True, default=str)}".encode())
            sources = [task.eval_docs] + ([task.fewshot_docs()] if num_fewshot else [])
            for doc in (doc for source in sources for doc in source):
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _leaves(manager: Any, name: str) -> dict[str, Any]:
    """The tasks behind a name, loaded: itself, or the members of a group or tag."""
    try:
        leaves = dict(manager.load([name])["tasks"])
        for leaf, task in leaves.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"`evaluate.tasks`: {leaf} {RUNS_ANSWERS}")
        return leaves
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"lm-eval: the data of {name} cannot be loaded ({_one_line(error)}); connect to the network, or leave the "
            "task out of `evaluate.tasks`"
        ) from error


def _result(name: str, leaves: dict[str, Any], answer: dict[str, Any]) -> TaskResult:
    names = list(leaves)
    reported = {leaf: _metrics(answer["results"][leaf]) for leaf in names}
    common = [metric for metric in reported[names[0]] if all(metric in values for values in reported.values())]
    metric = PRIMARY.get(name, "acc")
    if metric not in common:
        if not common:
            raise UserError(f"lm-eval: the tasks of {name} share no metric; name the tasks one by one")
        metric = common[0]
    samples, pieces = [], []
    for leaf in names:
        first_filter = answer["samples"][leaf][0]["filter"]
        for sample in answer["samples"][leaf]:
            if sample["filter"] == first_filter:
                pieces.append(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
                samples.append(_sample(sample, metric, leaf if len(names) > 1 else None))
    from lm_eval.utils import hash_string

    if all("score" in sample for sample in samples):
        value, stderr = mean_and_stderr([sample["score"] for sample in samples])
    elif len(names) == 1:
        value, stderr = reported[names[0]][metric], answer["results"][names[0]].get(f"{metric}_stderr,none", 0.0)
        stderr = float(stderr) if isinstance(stderr, int | float) else 0.0
    else:
        raise UserError(f"lm-eval: {metric} of the group {name} cannot be pooled; name its tasks one by one")
    versions = {str(answer["versions"].get(leaf)) for leaf in names}
    return TaskResult(
        name=name,
        metric=metric,
        higher_is_better=bool(answer["higher_is_better"][names[0]].get(metric, True)),
        chance=_chance(leaves, answer, metric),
        value=float(value),
        stderr=stderr,
        items=len(samples),
        version=", ".join(sorted(versions)),
        hash=hash_string("".join(pieces)),
        metrics=reported[names[0]] if len(names) == 1 else {metric: float(value)},
        samples=samples,
    )


def _sample(sample: dict[str, Any], metric: str, leaf: str | None) -> dict[str, Any]:
    """What is kept of one answered item."""
    kept: dict[str, Any] = {
        "id": f"{leaf}/{sample['doc_id']}" if leaf else sample["doc_id"],
        "prompt": sample["prompt_hash"],
        "target": str(sample["target"])[:KEPT_CHARACTERS],
        "responses": _plain(sample["filtered_resps"]),
    }
    kept |= {name: sample["doc"][name] for name in ("length", "depth") if name in sample["doc"]}
    value = sample[metric]
    if isinstance(value, int | float):
        return {**kept, "score": float(value)}
    if metric.endswith("perplexity") and isinstance(value, list | tuple) and len(value) == 2:
        return {**kept, "loss": -float(value[0]), "weight": float(value[1])}
    return kept


def _plain(value: Any) -> Any:
    """Responses as JSON: numbers rounded to what the model's dtype can mean, text cut."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return round(float(value), 6) if isinstance(value, int | float) else str(value)[:KEPT_CHARACTERS]


def _chance(leaves: dict[str, Any], answer: dict[str, Any], metric: str) -> float | None:
    """What guessing among the options reaches, averaged over items."""
    if not metric.startswith(("acc", "exact_match")):
        return None
    shares: list[float] = []
    for leaf, task in leaves.items():
        options = task.OUTPUT_TYPE == "multiple_choice"
        shares += [1 / len(sample["filtered_resps"]) if options else 0.0 for sample in answer["samples"][leaf]]
    return float(sum(shares) / len(shares))


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Metrics of a task by bare name, the first filter's where there are several."""
    metrics: dict[str, float] = {}
    for key, value in row.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr") and isinstance(value, int | float):
            metrics.setdefault(name, float(value))
    return metrics


class _HubCode(BaseException):
    """A task wants a metric that it would fetch; a BaseException, because lm-eval goes on after any other."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's and datasets' chatter: their warnings address its own command line, their bars nest badly.

    Under it no task fetches code either.
    """
    import datasets
    import evaluate
    from lm_eval import evaluator
    from tqdm import tqdm

    def refuse(metric: str, *args: Any, **kwargs: Any) -> None:
        raise _HubCode(metric)

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    original, bars = tqdm.__init__, datasets.utils.logging.is_progress_bar_enabled()
    commit, load = evaluator.get_git_commit_hash, evaluate.load
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tqdm.__init__, evaluate.load = disabled, refuse
    evaluator.get_git_commit_hash = lambda: None  # nobody reads it, and outside a checkout git complains
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it bootstraps
            yield
    except _HubCode as metric:
        raise UserError(
            f"`evaluate.tasks`: the metric {metric} is code from the Hugging Face hub, which is not run; leave it out"
        ) from None
    finally:
        tqdm.__init__, evaluate.load = original, load
        evaluator.get_git_commit_hash = commit
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Let lm-eval resample in this process, with the same numbers, instead of forking it once for each core.

    A fork that is still starting while the pool is ended already can lose the signal, where the process handles it (as
    stages do); the pool then waits for ever.
    """
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""lm-eval's own definitions, unmodified, on fixtures in the data sets' real layout, for teacher and student."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from lolcats_core import LinearizeConfig, linearize
from lolcats_core.evaluation.harness import TaskResult, run_lm_eval, task_hash
from tests.core.evaluation.hub import make_hub
from tests.core.tiny import byte_teacher, byte_tokenizer

TASKS = ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "wikitext", "lambada_openai"]
PRIMARY = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "wikitext": "word_perplexity"}
CHANCE = {"piqa": 0.5, "winogrande": 0.5, "wikitext": None, "lambada_openai": 0.0}
MMLU = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
SUBJECTS = tuple(
    sorted(re.findall(r'"dataset_name": "(\w+)"', "".join(file.read_text() for file in MMLU.glob("mmlu_*.yaml"))))
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"), mmlu_subjects=SUBJECTS)


@pytest.fixture(autouse=True)
def _in_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub / "cache")


@pytest.fixture(scope="module")
def student() -> Any:
    return linearize(byte_teacher(initializer_range=0.2), LinearizeConfig(window_size=16, feature_dim=8), seed=3)


def test_every_named_task_answers_with_its_published_metric_and_its_chance(student: Any) -> None:
    results = {}
    for name, model in (("teacher", byte_teacher(initializer_range=0.2)), ("student", student)):
        results[name] = run_lm_eval(model, byte_tokenizer(), TASKS)
    for task in TASKS:
        teacher, student_result = results["teacher"][task], results["student"][task]
        assert teacher.metric == PRIMARY.get(task, "acc")
        assert teacher.chance == CHANCE.get(task, 0.25)
        assert teacher.higher_is_better == (task != "wikitext")
        assert teacher.items == 7
        assert teacher.hash == student_result.hash
        assert [s["responses"] for s in teacher.samples] != [s["responses"] for s in student_result.samples]


def test_mmlu_is_five_shot_over_all_subjects_and_pooled_over_items(student: Any) -> None:
    assert len(SUBJECTS) == 57
    pooled = run_lm_eval(student, byte_tokenizer(), ["mmlu"], num_fewshot=5, limit=1)["mmlu"]
    assert (pooled.metric, pooled.items, pooled.chance) == ("acc", 57, 0.25)
    assert pooled.value == sum(sample["score"] for sample in pooled.samples) / 57
    one = run_lm_eval(student, byte_tokenizer(), ["mmlu_anatomy"], limit=1)["mmlu_anatomy"]
    same = next(sample for sample in pooled.samples if sample["id"] == "mmlu_anatomy/0")
    assert one.samples[0]["prompt"] != same["prompt"]  # without the five examples


def test_the_numbers_are_those_of_lm_eval_run_on_the_exported_directory(
    student: Any, hub: Path, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path / "exported")
    byte_tokenizer().save_pretrained(tmp_path / "exported")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", ",".join(TASKS)]
    command += ["--model_args", f"pretrained={tmp_path / 'exported'},trust_remote_code=True,dtype=float32"]
    command += ["--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(hub / "cache")}
    done = subprocess.run(command, cwd=hub, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    reported = json.loads(file.read_text())["results"]
    ours = run_lm_eval(student, byte_tokenizer(), TASKS)
    for task in TASKS:
        for metric, value in ours[task].metrics.items():
            assert reported[task][f"{metric},none"] == pytest.approx(value, rel=1e-4), (task, metric)
        if ours[task].chance is not None:
            stderr = reported[task][f"{ours[task].metric}_stderr,none"]
            assert stderr == pytest.approx(ours[task].stderr, rel=1e-4), task


def test_resampling_forks_no_process(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of forks can wait for ever for one that lost the signal to end."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("lm-eval made a pool of processes")

    monkeypatch.setattr("multiprocessing.Pool", refuse)
    resampled = run_lm_eval(student, byte_tokenizer(), ["lambada_openai"])["lambada_openai"].metrics
    assert resampled["perplexity"] > 1


def test_a_run_cut_short_asks_only_what_is_left(student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = type(student).forward

    def counted(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        asked.append(len(input_ids))
        if len(asked) == limit:
            raise KeyboardInterrupt
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(type(student), "forward", counted)

    def ask(answers: Path) -> TaskResult:
        return run_lm_eval(student, byte_tokenizer(), ["arc_easy"], batch_size=4, answers=answers)["arc_easy"]

    limit = -1
    whole, forwards = ask(tmp_path / "whole"), len(asked)
    asked.clear()
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "cut")
    asked.clear()
    limit = -1
    resumed = ask(tmp_path / "cut")
    assert len(asked) < forwards
    assert resumed.value == whole.value
    assert resumed.hash == whole.hash


def test_a_tasks_hash_follows_its_documents_and_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task_hash("piqa")
    assert task_hash("piqa") == first
    assert len({first, task_hash("piqa", num_fewshot=5), task_hash("arc_easy")}) == 3
    monkeypatch.chdir(make_hub(tmp_path / "hub", rows=5))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert task_hash("piqa") != first

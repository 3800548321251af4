"""The stage `evaluate` on a tiny teacher: what it writes, and that a cut-short run ends in the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from lolcats_common.params import ComputeParams, EvaluateParams, FinetuneParams, Params, TeacherParams
from lolcats_core import LinearizeConfig, linearize, load_feature_maps, low_rank_finetune, save_feature_maps
from lolcats_core.data.rows import TokenRows, TokenRowsWriter
from lolcats_core.evaluation.control import control_settings
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.teacher.pin import Teacher, resolve_teacher, write_pin
from lolcats_core.training.perplexity import perplexity
from tasks import evaluate
from tasks.measurements import models, suite
from tests.core.evaluation.test_code_continuation import code
from tests.core.tiny import byte_teacher, byte_tokenizer

LENGTH = 256
# Where each measurement of a whole model is called.
MEASURED = {"perplexity": models, "copy_recall": suite, "run_lm_eval": suite}
PARAMS = Params(
    seed=1,
    compute=ComputeParams(device="cpu"),
    linearize=LinearizeConfig(window_size=16, feature_dim=8),
    evaluate=EvaluateParams(
        batch_size=4,
        max_perplexity_rows=5,
        recall_gaps=(16, 32),
        recall_samples=3,
        tasks=("code_continuation", "copy"),
        task_limit=8,
        synthetic_lengths=(128,),
        synthetic_samples=2,
        long_rows=1,
        generation_prompts=2,
        generation_tokens=6,
        audit_rows=2,
    ),
)


class FakeStage:
    """A stage without a harness: directories, and what was logged."""

    name = "evaluate"

    def __init__(self, root: Path, work: Path, params: Params = PARAMS) -> None:
        self.root, self.params = root, params
        self.out, self.scratch, self.results = work / "out", work / "scratch", work / "results"
        self.out.mkdir(parents=True, exist_ok=True)
        self.figures: dict[str, Any] = {}
        self.datasets: list[tuple[str, ...]] = []

    def input(self, stage: str) -> Path:
        path = self.root / stage
        if not path.is_dir():
            raise UserError(f"outputs/{stage} is missing")
        return path

    def log_figure(self, name: str, figure: Any) -> None:
        self.figures[name] = figure

    def log_dataset(self, *values: str) -> None:
        self.datasets.append(values)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Earlier stages' outputs of a tiny random teacher."""
    root = tmp_path_factory.mktemp("outputs")
    tokenizer, teacher = byte_tokenizer(), byte_teacher()
    (root / "teacher").mkdir()
    ids = tokenizer(code(150))["input_ids"]
    for name, first in (("train", 0), ("validation", LENGTH * 60)):
        with TokenRowsWriter(root / "prepare" / name, sequence_length=LENGTH, vocab_size=257) as writer:
            rows = torch.tensor(ids[first : first + LENGTH * 60]).unfold(0, LENGTH, LENGTH)
            writer.append(input_ids=rows.numpy())
    student = linearize(teacher, PARAMS.linearize, seed=5)
    (root / "select").mkdir()
    save_feature_maps(student, root / "select" / "feature_maps.safetensors")
    write_json(root / "select" / "selection.json", {"linearize": PARAMS.linearize.to_dict()})
    student.save_pretrained(root / "finetune" / "model")
    teacher.save_pretrained(root / "teacher" / "model")
    tokenizer.save_pretrained(root / "teacher" / "model")
    write_pin(resolve_teacher(TeacherParams(source=str(root / "teacher" / "model")), root), root, root / "teacher")
    return root


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns what was loaded whole."""
    seen: list[str] = []
    load = Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda *arguments: (seen.append("teacher"), load(*arguments))[1])
    return seen


def test_the_stage_writes_the_numbers_of_the_table(outputs: Path, tmp_path: Path) -> None:
    stage = FakeStage(outputs, tmp_path)
    metrics = evaluate.run(stage)  # type: ignore[arg-type]
    result = json.loads((stage.out / "evaluation.json").read_text())
    assert set(result["perplexity"]) == {"teacher", "swapped", "transferred", "finetuned", "bigram"}

    rows = TokenRows.open(outputs / "prepare" / "validation")
    teacher = AutoModelForCausalLM.from_pretrained(outputs / "teacher" / "model").eval()
    student = linearize(teacher, PARAMS.linearize, seed=PARAMS.seed)
    assert result["perplexity"]["swapped"] == perplexity(student, rows, batch_size=4, max_rows=5).perplexity
    load_feature_maps(student, outputs / "select" / "feature_maps.safetensors")
    assert result["perplexity"]["transferred"] == perplexity(student, rows, batch_size=4, max_rows=5).perplexity
    # The student as saved is the transferred one.
    assert result["perplexity"]["finetuned"] == pytest.approx(result["perplexity"]["transferred"], rel=1e-5)
    assert result["perplexity"]["bigram"] < result["perplexity"]["teacher"]

    recall = copy_recall(teacher, 257, (16,), 3, 1, 4, exclude_ids=(0,))[16]
    assert result["recall"]["teacher"]["16"] == {"value": recall.value, "stderr": recall.stderr}
    assert set(result["recall"]["finetuned"]) == {"16", "32"}

    task = result["tasks"]["code_continuation"]
    assert (task["metric"], task["items"], task["version"]) == ("acc_norm", 8, "1.0")
    difference = task["finetuned"]["value"] - task["teacher"]["value"]
    assert task["paired"]["difference"] == pytest.approx(difference)
    assert 0 < task["paired"]["p_value"] <= 1
    samples = [
        json.loads(line) for line in (stage.out / "samples" / "code_continuation.jsonl").read_text().splitlines()
    ]
    assert sum(sample["teacher"] for sample in samples) / 8 == task["teacher"]["value"]
    assert len((stage.out / "code_continuation.jsonl").read_text().splitlines()) == 8

    assert set(stage.figures) == {"perplexity.png", "recall.png", "tasks.png"}
    assert all((stage.out / name).read_bytes().startswith(b"\x89PNG") for name in stage.figures)
    copying = result["tasks"]["copy"]
    assert [cell["depth"] for cell in copying["cells"]["teacher"]] == [0.1, 0.5, 0.9]
    assert (copying["chance"], task["chance"]) == (0.0, 0.25)
    assert task["recovery"]["value"] == pytest.approx(task["finetuned"]["value"] / task["teacher"]["value"])
    assert [len(result["positions"][step]["ranges"]) for step in ("teacher", "finetuned")] == [5, 5]
    assert result["positions"]["teacher"]["length"] == 4 * LENGTH  # the teacher's context
    control = result["control"]
    settings = control_settings(teacher.config, PARAMS.linearize, torch.float32, 4 * LENGTH)
    assert settings is not None
    plain = linearize(teacher, settings)
    assert control["perplexity"] == perplexity(plain, rows, batch_size=4, max_rows=5).perplexity
    assert control["bytes"] <= control["student_bytes"]
    assert (control["tokens"], set(control["recall"])) == (4 * LENGTH, {"16", "32"})
    student_losses, plain_losses = (
        {entry["start"]: entry["loss"] for entry in found["ranges"]}
        for found in (result["positions"]["finetuned"], control["positions"])
    )
    assert control["differences"]
    for entry in control["differences"]:
        expected = student_losses[entry["start"]] - plain_losses[entry["start"]]
        assert entry["difference"] == pytest.approx(expected, abs=2e-2)
    assert result["generation"]["prompts"] == 2
    state = result["state"]
    assert metrics["state_over_published"] == (state["linear"] + state["exact"]) / state["published"]
    assert metrics["state_per_token_bytes"] == state["per_token"] == 0
    audit = result["audit"]
    assert {len(audit[name]) for name in ("layers", "entropy", "head_errors", "linear_mass")} == {2}
    assert audit["whole"] != audit["linear_off"]
    speed = json.loads((stage.out / "speed.json").read_text())
    assert set(speed) == {"teacher", "finetuned"}

    assert stage.datasets[0][0] == "validation"
    expected = result["perplexity"]["finetuned"] / result["perplexity"]["teacher"]
    assert metrics["ratio_finetuned_to_teacher"] == expected
    assert metrics["recall_16_teacher"] == recall.value
    assert metrics["code_continuation_acc_norm_finetuned"] == task["finetuned"]["value"]
    assert all(isinstance(value, int | float) for value in metrics.values())


@pytest.mark.parametrize("killed_in", ["perplexity", "copy_recall", "run_lm_eval"])
def test_a_run_killed_anywhere_ends_in_the_same_bytes_and_measures_nothing_twice(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    whole = FakeStage(outputs, tmp_path / "whole")
    evaluate.run(whole)  # type: ignore[arg-type]

    calls: list[str] = []
    killing = True

    def watch(name: str, original: Any) -> Any:
        def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
            if killing and name == killed_in and hasattr(model.config, "linearize"):
                raise KeyboardInterrupt
            calls.append(name)
            return original(model, *args, **kwargs)

        return wrapped

    for name, module in MEASURED.items():
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(FakeStage(outputs, tmp_path / "cut"))  # type: ignore[arg-type]
    killing = False
    resumed = FakeStage(outputs, tmp_path / "cut")
    evaluate.run(resumed)  # type: ignore[arg-type]
    assert sorted(calls) == ["copy_recall"] * 6 + ["perplexity"] * 4 + ["run_lm_eval"] * 4
    written = sorted(path.relative_to(whole.out) for path in whole.out.rglob("*") if path.is_file())
    assert written == sorted(path.relative_to(resumed.out) for path in resumed.out.rglob("*") if path.is_file())
    same = [file for file in written if file.name != "speed.json"]
    assert all((whole.out / file).read_bytes() == (resumed.out / file).read_bytes() for file in same)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff"])
def test_what_a_cut_short_run_left_damaged_is_measured_again(outputs: Path, tmp_path: Path, damage: bytes) -> None:
    params = replace(PARAMS, evaluate=replace(PARAMS.evaluate, tasks=("copy",), audit_rows=0, long_rows=0))
    whole, again = FakeStage(outputs, tmp_path / "whole", params), FakeStage(outputs, tmp_path / "again", params)
    evaluate.run(whole)  # type: ignore[arg-type]
    evaluate.run(again)  # type: ignore[arg-type]
    kept = [path for folder in (again.scratch, again.results) for path in folder.rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} >= {"measured", "answers", "results"}
    for file in kept:
        file.write_bytes(damage)
    evaluate.run(again)  # type: ignore[arg-type]
    assert (whole.out / "evaluation.json").read_bytes() == (again.out / "evaluation.json").read_bytes()


def test_a_finished_evaluation_loads_no_model(outputs: Path, tmp_path: Path, loaded: list[str]) -> None:
    for _ in range(2):
        evaluate.run(FakeStage(outputs, tmp_path))  # type: ignore[arg-type]
    assert loaded == ["teacher"]


def test_without_tasks_or_gaps_only_perplexity_is_measured(outputs: Path, tmp_path: Path) -> None:
    nothing = {"tasks": (), "recall_gaps": (), "long_rows": 0, "generation_prompts": 0, "audit_rows": 0}
    params = replace(PARAMS, evaluate=replace(PARAMS.evaluate, **nothing))  # type: ignore[arg-type]
    stage = FakeStage(outputs, tmp_path, params)
    metrics = evaluate.run(stage)  # type: ignore[arg-type]
    assert set(stage.figures) == {"perplexity.png"}
    assert not any(name.startswith("recall") for name in metrics)


@pytest.mark.parametrize("killed", [False, True])
def test_models_that_do_not_fit_have_the_same_perplexities_and_say_what_is_left_out(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str], killed: bool
) -> None:
    whole = evaluate.run(FakeStage(outputs, tmp_path / "whole"))  # type: ignore[arg-type]
    monkeypatch.setattr(models, "device_memory", lambda device: 1000.0)
    loaded.clear()
    stage = FakeStage(outputs, tmp_path / "streamed")
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(models.Models, "_untrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                evaluate.run(stage)  # type: ignore[arg-type]
    metrics = evaluate.run(stage)  # type: ignore[arg-type]
    assert loaded == []
    assert metrics == {name: pytest.approx(whole[name], rel=1e-5) for name in metrics}
    assert {f"perplexity_{step}" for step in (*evaluate.STEPS, "bigram")} <= set(metrics)
    result = json.loads((stage.out / "evaluation.json").read_text())
    left_out = ["recall_gaps", "tasks", "long_rows", "generation_prompts", "audit_rows"]
    assert result["left_out"] == left_out
    assert not list((stage.scratch / "hidden").iterdir())


def test_bfloat16_is_measured_too(outputs: Path, tmp_path: Path) -> None:
    params = replace(PARAMS, compute=replace(PARAMS.compute, precision="bfloat16"))
    metrics = evaluate.run(FakeStage(outputs, tmp_path, params))  # type: ignore[arg-type]
    assert metrics["perplexity_finetuned"] == pytest.approx(metrics["perplexity_transferred"], rel=0.02)


def test_a_missing_student_is_named(outputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    root.mkdir()
    for name in ("teacher", "prepare", "select"):
        (root / name).symlink_to(outputs / name)
    (root / "finetune").mkdir()
    with pytest.raises(UserError, match=r"finetune/model: does not load .*run stage `finetune` again"):
        evaluate.run(FakeStage(root, tmp_path / "work"))  # type: ignore[arg-type]


def test_different_questions_are_never_compared() -> None:
    result = {"name": "arc_easy", "hash": "a"}
    with pytest.raises(RuntimeError, match="different questions in arc_easy"):
        evaluate.compare_task(result, {**result, "hash": "b"})


def test_a_begin_token_is_shown_only_by_tokenizers_that_add_one() -> None:
    assert suite.begin_ids(byte_tokenizer()) == ()

    class Beginning(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [5, 7]}

    assert suite.begin_ids(Beginning(bos_token_id=5)) == (5,)  # type: ignore[arg-type]


def test_another_run_measures_only_what_its_model_or_settings_change(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FakeStage(outputs, tmp_path / "first")
    evaluate.run(first)  # type: ignore[arg-type]
    calls: list[str] = []
    for name, module in MEASURED.items():
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _o=original, **k: (calls.append(_n), _o(*a, **k))[1])
    params = replace(PARAMS, evaluate=replace(PARAMS.evaluate, recall_gaps=(16, 64)))
    second = FakeStage(outputs, tmp_path / "second", params)
    second.results = first.results
    evaluate.run(second)  # type: ignore[arg-type]
    assert calls == ["copy_recall"] * 3  # of teacher, control and student at the new gap


def test_a_trained_control_is_the_plain_window_after_the_students_own_stage_2(outputs: Path, tmp_path: Path) -> None:
    few = {"max_perplexity_rows": 3, "recall_gaps": (16,), "tasks": (), "generation_prompts": 0, "audit_rows": 0}
    training = FinetuneParams(max_steps=2, batch_size=2, max_eval_rows=2, lora_rank=2)
    params = replace(
        PARAMS, finetune=training, evaluate=replace(PARAMS.evaluate, **few, long_rows=0, control="trained")
    )
    stage = FakeStage(outputs, tmp_path, params)
    evaluate.run(stage)  # type: ignore[arg-type]
    control = json.loads((stage.out / "evaluation.json").read_text())["control"]
    assert control["trained"]
    teacher = AutoModelForCausalLM.from_pretrained(outputs / "teacher" / "model").eval()
    settings = control_settings(teacher.config, PARAMS.linearize, torch.float32, 4 * LENGTH)
    assert settings is not None
    rows = [TokenRows.open(outputs / "prepare" / name) for name in ("train", "validation")]
    plain = linearize(teacher, settings)
    before = perplexity(plain, rows[1], batch_size=4, max_rows=3).perplexity
    adapted, _ = low_rank_finetune(plain, *rows, training, scratch=tmp_path / "own", seed=PARAMS.seed)
    after = perplexity(adapted, rows[1], batch_size=4, max_rows=3).perplexity
    assert control["perplexity"] == pytest.approx(after, rel=1e-6)
    assert control["perplexity"] != pytest.approx(before, rel=1e-6)

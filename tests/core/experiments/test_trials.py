"""Trials side by side: what they share, keep and measure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_core.experiments import study as study_module
from lolcats_core.experiments import trials
from lolcats_core.experiments.study import EvalSettings, StudyContext, agreement, exclude_ids, state_bytes
from lolcats_core.experiments.trials import Trial, cache_budgets, finished, run_trial, run_trials
from lolcats_core.training.perplexity import perplexity
from tests.core.tiny import SETTINGS, FakeRows, tiny_student, tiny_teacher

EVALUATION = EvalSettings(4, 6, (8, 12), 2, 2, 5, 4, context=100)
TRAINING = {"max_steps": 3, "batch_size": 4, "max_eval_rows": 4}
DEFAULTS: dict[str, Any] = {
    "linearize": {"window_size": 8, "feature_dim": 8},
    "transfer": TRAINING,
    "finetune": {**TRAINING, "lora_rank": 2},
}
KEPT = {"select": {"softmax_budget": {"cache_ratio": 0.2}}}


def study(folder: Path, **changes: Any) -> StudyContext:
    teacher = tiny_teacher(**changes)
    return StudyContext(teacher, FakeRows(24), FakeRows(8, seed=1), EVALUATION, folder, exclude_ids(teacher.config))


def trial(name: str, overrides: dict[str, Any], seed: int = 0) -> Trial:
    return dataclasses.replace(Trial.from_overrides(name, DEFAULTS, overrides), seed=seed)


def numbers(result: dict[str, Any] | None) -> dict[str, Any]:
    """A result without what two runs never have in common, and without its controls."""
    assert result is not None
    return {name: value for name, value in result.items() if name not in ("seconds", "controls")}


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every attention transfer that is trained."""
    trained: list[int] = []
    original = trials.attention_transfer
    monkeypatch.setattr(trials, "attention_transfer", lambda *a, **k: (trained.append(1), original(*a, **k))[1])
    return trained


def test_trials_share_their_maps_and_are_read_when_finished(tmp_path: Path, transfers: list[int]) -> None:
    shared = study(tmp_path)
    before = {name: p.clone() for name, p in shared.teacher.state_dict().items()}
    plain, kept = run_trials([trial("plain", {}), trial("kept", KEPT)], shared)
    assert len(transfers) == 1
    assert numbers(run_trial(trial("kept", KEPT), study(tmp_path))) == numbers(kept)
    run_trial(trial("plain", {}, seed=1), shared)
    assert len(transfers) == 2
    run_trial(trial("plain", {}), study(tmp_path, seed=1))
    assert len(transfers) == 3
    # Trials share the teacher's weights, so none of them may change it.
    assert all(torch.equal(before[name], p) for name, p in shared.teacher.state_dict().items())
    assert plain["tokens"] == kept["tokens"] == 2 * 3 * 4 * 40
    assert kept["selection"]["cache_ratio"] == 1 / 6
    assert kept["transferred"]["perplexity"] != plain["transferred"]["perplexity"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_shared_transfer_gives_the_numbers_of_one_s_own(tmp_path: Path, transfers: list[int]) -> None:
    _, shared = run_trials([trial("plain", {}), trial("kept", KEPT)], study(tmp_path / "shared"))
    assert len(transfers) == 1
    own = run_trial(trial("kept", KEPT), study(tmp_path / "alone"))
    assert len(transfers) == 2
    assert numbers(own) == numbers(shared)


def test_other_measurements_share_the_transfer_and_not_the_result(tmp_path: Path, transfers: list[int]) -> None:
    first = study(tmp_path)
    run_trial(trial("plain", {}), first)
    other = dataclasses.replace(first, settings=dataclasses.replace(EVALUATION, recall_gaps=(9,)))
    result = run_trial(trial("renamed", {}), other)
    assert result is not None
    assert (result["recipe"], set(result["finetuned"]["recall"])) == ("renamed", {"9"})
    assert len(transfers) == 1


def test_new_code_makes_old_results_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closure = study_module.import_closure(study_module.ENGINE, root=Path(trials.__file__).parents[2])
    decisive = ("experiments.trials", "experiments.study", "training.loop", "model.attention", "model.sinks")
    assert {f"lolcats_core.{name}" for name in decisive} <= closure.keys()
    assert "lolcats_kernels.hybrid_attention.naive" in closure
    edited = tmp_path / "loop.py"
    edited.write_text(closure["lolcats_core.training.loop"].read_text() + "\n# edited\n")
    before = study(tmp_path).inputs
    changed = {**closure, "lolcats_core.training.loop": edited}
    monkeypatch.setattr(study_module, "import_closure", lambda *_, **__: changed)
    assert study(tmp_path).inputs != before


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_trial_that_another_process_works_on_is_left_to_it_until_that_is_killed(tmp_path: Path) -> None:
    shared, quick = (
        study(tmp_path),
        dataclasses.replace(trial("quick", {"transfer": {"enabled": False}}), finetune=None),
    )
    lock = trials._file(quick, shared).with_suffix(".lock")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert run_trial(quick, shared, wait=False) is None
        assert finished(quick, shared) is None
        os.kill(holder.pid, signal.SIGKILL)
    assert run_trial(quick, shared, wait=False) == finished(quick, shared)


def test_a_killed_trial_continues_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = {"finetune": {"checkpoint_every": 1, "log_every": 1}}
    undisturbed = run_trial(trial("plain", each), study(tmp_path / "undisturbed"))
    shared = study(tmp_path / "killed")

    class Killed(BaseException):
        pass

    original = trials.low_rank_finetune

    def killed(*arguments: Any, **named: Any) -> Any:
        def at_step_two(values: dict[str, float], step: int) -> None:
            if step == 2:
                raise Killed

        return original(*arguments, log=at_step_two, **named)

    monkeypatch.setattr(trials, "low_rank_finetune", killed)
    with pytest.raises(Killed):
        run_trial(trial("plain", each), shared)
    assert list(shared.folder.glob("trial-*/checkpoint.pt"))
    monkeypatch.undo()
    assert numbers(run_trial(trial("plain", each), shared)) == numbers(undisturbed)
    assert not [path for path in shared.folder.iterdir() if path.is_dir()]


def test_a_trial_that_diverges_says_so_and_is_not_repeated(tmp_path: Path, transfers: list[int]) -> None:
    bad = trial("bad", {"transfer": {"lr": 3e37, "max_grad_norm": 1e38}})
    result, again = run_trial(bad, study(tmp_path)), run_trial(bad, study(tmp_path))
    assert result is not None
    assert (result["transferred"], result["finetuned"], result["layer_errors"]) == (None, None, {})
    assert "the loss" in result["diverged"]
    assert again == result
    assert len(transfers) == 1
    assert json.loads(json.dumps(result)) == result


def test_a_row_measures_the_student_that_its_selection_describes(tmp_path: Path) -> None:
    shared = study(tmp_path)
    row = run_trial(dataclasses.replace(trial("kept", KEPT), finetune=None), shared)
    assert row is not None
    heads = row["selection"]["linearize"]["softmax_heads"]
    assert sum(len(groups) for groups in heads.values()) == 1
    assert "finetuned" not in row
    assert row["tokens"] == 3 * 4 * 40
    measured = row["transferred"]
    assert set(measured["recall"]) == {"8", "12"}
    assert 0 <= measured["agreement"] <= 1
    assert 0 <= measured["exact_prefix"] <= 1
    assert measured["linear_off"] != measured["audited"] != measured["window_off"]
    everything = {"linearize": {**DEFAULTS["linearize"], "softmax_layers": [0, 1, 2]}, "transfer": {"enabled": False}}
    softmax = run_trial(dataclasses.replace(trial("softmax", everything), finetune=None), shared)
    assert softmax is not None
    teacher = softmax["transferred"]
    expected = perplexity(shared.teacher, shared.validation_rows, batch_size=4, max_rows=6).perplexity
    assert teacher["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert teacher["perplexity"] == pytest.approx(shared.teacher_row["perplexity"], rel=1e-5)
    assert (teacher["agreement"], teacher["exact_prefix"], teacher["state"]["share"]) == (1.0, 1.0, 1.0)
    assert (teacher["linear_off"], teacher["window_off"]) == (None, None)


def test_what_is_not_asked_for_is_not_measured(tmp_path: Path) -> None:
    settings = dataclasses.replace(EVALUATION, generation_prompts=0, audit_rows=0)
    shared = dataclasses.replace(study(tmp_path), settings=settings)
    quick = dataclasses.replace(trial("quick", {"transfer": {"enabled": False}}), finetune=None)
    result = run_trial(quick, shared)
    assert result is not None
    assert set(result["transferred"]) == {"perplexity", "recall", "state", "row_losses"}


def test_agreement_is_the_share_of_equal_predictions() -> None:
    teacher, student, rows = tiny_teacher(), tiny_student(settings=SETTINGS), FakeRows(5)
    with torch.no_grad():
        ids = rows.batch(range(5))["input_ids"]
        same = teacher(ids).logits[:, :-1].argmax(-1) == student(ids, use_cache=False).logits[:, :-1].argmax(-1)
    assert agreement(teacher, student, rows, 5, 2) == pytest.approx(same.double().mean().item())
    assert agreement(teacher, teacher, rows, 3, 2) == 1.0


def test_the_state_is_constant_and_what_keeps_softmax_grows(tmp_path: Path) -> None:
    shared = study(tmp_path)
    settings = dataclasses.replace(SETTINGS, softmax_heads={1: (0,)})
    state = state_bytes(lc.linearize(shared.teacher, settings), shared)
    token = 2 * 8 * 4  # k and v of one kv head of 8 in float32
    assert state["per_token"] == token
    # k and v of the two chunks of eight for two kv heads; S and z of four query heads; the number of tokens.
    ring, sums, length = 2 * 16 * 2 * 8 * 4, 4 * 16 * (8 + 1) * 4, 8
    assert state["constant"] == 2.5 * (ring + sums) + 3 * length
    assert state["bytes"] == state["constant"] + 100 * token
    assert state["share"] == pytest.approx(state["bytes"] / (100 * 6 * token))
    assert state_bytes(shared.teacher, shared)["share"] == 1.0


def test_overrides_that_are_no_recipe_are_refused() -> None:
    with pytest.raises(UserError, match="recipe 'a': sections are linearize, transfer, select, finetune, got 'data'"):
        Trial.from_overrides("a", DEFAULTS, {"data": {"source": "x"}})
    with pytest.raises(UserError, match=r"recipe .a.: unknown key `transfer\.lrr`"):
        Trial.from_overrides("a", DEFAULTS, {"transfer": {"lrr": 1}})


def test_cache_budgets_are_trials_by_cache_ratio() -> None:
    base = Trial.from_overrides("base", DEFAULTS, {"select": {"criterion": "greedy_kl"}})
    points = cache_budgets(base, (0.5, 0.0, 0.25))
    assert [point.name for point in points] == ["0", "0.25", "0.5"]
    assert [point.select.softmax_budget for point in points] == [
        None,
        {"cache_ratio": 0.25},
        {"cache_ratio": 0.5},
    ]
    assert all(point.select.criterion == "greedy_kl" for point in points)

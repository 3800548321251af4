"""The ablation's trials, one trial from start to end, and when the published ordering is said to hold."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import FinetuneParams, Params, TransferParams
from lolcats_core.experiments import ablation
from lolcats_core.experiments import trials as engine
from lolcats_core.experiments.ablation import (
    Budget,
    check_sections,
    kept_layer_trials,
    projections,
    published_trial,
    run,
    table_row,
    trials,
)
from lolcats_core.experiments.ablation_report import markdown, published_ordering, report_on
from lolcats_core.experiments.study import StudyContext
from lolcats_core.experiments.trials import Trial, run_trial
from tests.core.tiny import FakeRows, tiny_teacher

BASE = LinearizeConfig(window_size=8, feature_dim=8)
BUDGET = Budget(steps=2, batch_size=2, eval_rows=2, recall_gap=8, recall_samples=2)
PARAMS = Params(linearize=BASE, finetune=FinetuneParams(lr=1e-3))


def study(folder: Path) -> StudyContext:
    return StudyContext(tiny_teacher(), FakeRows(), FakeRows(rows=4, seed=1), BUDGET.evaluation(0), folder)


def row(trial: Trial, shared: StudyContext) -> dict[str, Any]:
    result = run_trial(trial, shared)
    assert result is not None
    return table_row(trial, result)


def test_the_grid_is_complete_and_the_other_trials_leave_the_published_recipe_in_one_thing() -> None:
    sets = projections(tiny_teacher(), PARAMS.finetune.target_modules)
    found = trials(PARAMS, BUDGET, sets)
    grid = [trial.values() for trial in trials(PARAMS, BUDGET, sets, ["grid"])]
    assert all(grid.count(values) == 1 for values in grid)
    assert len(grid) == 2 * 3 * 2 * 2
    assert all(each["linearize"]["feature_map_bias"] == (each["linearize"]["feature_map"] == "t2r") for each in grid)
    published = published_trial(PARAMS, BUDGET)
    assert published.values() in grid
    for section in ("lora_rank", "projections", "window_size", "transfer_steps"):
        chosen = [trial for trial in found if trial.name.startswith(section)]
        assert chosen
        for trial in chosen:
            values = vars(trial), vars(published)
            apart = [key for key in values[0] if key != "name" and values[0][key] != values[1][key]]
            assert len(apart) <= 1, trial
    sizes = [trial.linearize.window_size for trial in found if trial.name.startswith("window_size")]
    assert sizes == [4, 8, 16, 32, 64, 128, 256]
    assert ("q_proj", "k_proj") in sets
    assert set(sets[-1]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(UserError, match=r"a section must be one of grid, .* got 'grids'"):
        check_sections(["lora_rank", "grids"])


def test_windows_that_see_a_whole_row_are_no_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "run_trials", lambda found, *_: [{}] * len(found))
    monkeypatch.setattr(ablation, "table_row", lambda trial, _: trial.linearize.window_size)
    assert run(study(tmp_path), PARAMS, BUDGET, ["window_size"]) == [4, 8, 16]


def test_ours_keeps_softmax_where_the_transfer_error_is_largest() -> None:
    found = kept_layer_trials(published_trial(PARAMS, BUDGET), {0: 0.2, 1: 0.1, 2: 0.9})
    assert [trial.linearize.softmax_layers for trial in found] == [(), (2,), (0, 2)]
    assert found[1].name == "softmax_layers/softmax kept in layer 2"


def test_a_trial_is_trained_once_and_shares_its_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[Any] = []
    original = engine.attention_transfer
    monkeypatch.setattr(engine, "attention_transfer", lambda *a, **k: (transfers.append(1), original(*a, **k))[1])
    shared = study(tmp_path)
    without, published = trials(PARAMS, BUDGET, [], ["grid"])[4:6]
    assert published.values() == published_trial(PARAMS, BUDGET).values()
    before = {name: p.clone() for name, p in shared.teacher.state_dict().items()}
    first = row(published, shared)
    assert row(published, shared) == first
    (rank,) = (trial for trial in trials(PARAMS, BUDGET, [], ["lora_rank"]) if trial.name == "lora_rank/rank 4")
    other_rank = row(rank, shared)
    assert len(transfers) == 1
    assert other_rank["before"] == first["before"]
    assert other_rank["after"] != first["after"]
    assert first["tokens"] == 2 * 2 * 2 * 40
    untransferred = row(without, shared)
    assert len(transfers) == 1
    assert untransferred["tokens"] == first["tokens"]
    assert (untransferred["transfer_steps"], first["transfer_steps"]) == (0, 2)
    assert set(first["layer_errors"]) == {"0", "1", "2"}
    # Trials share the teacher's weights, so none of them may change it.
    assert all((before[name] == p).all() for name, p in shared.teacher.state_dict().items())


def test_a_trial_that_diverges_is_said_to_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.low_rank_finetune

    def diverging(student: Any, *rest: Any, **named: Any) -> Any:
        if rest[2].lora_rank == 4:  # weights that overflow, as a learning rate that is too high leaves them
            student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight * math.nan, requires_grad=False)
        return original(student, *rest, **named)

    monkeypatch.setattr(engine, "low_rank_finetune", diverging)
    shared = study(tmp_path)
    results = run(shared, PARAMS, BUDGET, ["lora_rank"])
    assert [row["label"] for row in results if row["after"] is None] == ["rank 4"]
    bad, *good = results
    assert bad["before"] is not None
    assert all(row["recall"] is not None and math.isfinite(row["after"]) for row in good)
    assert run(shared, PARAMS, BUDGET, ["lora_rank"]) == results
    text = re.sub(" +", " ", markdown(report_on(shared, PARAMS, BUDGET, "tiny", results)))
    assert "| rank 4 |" in text
    assert "| diverged | - | diverged |" in text


def test_a_transfer_that_diverges_leaves_a_row_without_measurements(tmp_path: Path) -> None:
    params = dataclasses.replace(PARAMS, transfer=TransferParams(lr=3e37, max_grad_norm=1e38))
    results = run(study(tmp_path), params, BUDGET, ["softmax_layers"])
    # Without errors there is nothing to choose kept layers by.
    assert [row["label"] for row in results] == ["published recipe"]
    assert [results[0][name] for name in ("before", "after", "recall")] == [None] * 3


def test_processes_over_one_folder_share_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    original = engine._train_and_measure

    def counted(trial: Trial, *rest: Any, **named: Any) -> Any:
        trained.append(trial.name)
        return original(trial, *rest, **named)

    monkeypatch.setattr(engine, "_train_and_measure", counted)
    results: list[Any] = [None, None]
    studies = [study(tmp_path), study(tmp_path)]  # both threads draw from one generator

    def work(number: int) -> None:
        results[number] = run(studies[number], PARAMS, BUDGET, ["lora_rank", "softmax_layers"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert len(results[0]) == 4 + 3
    assert len(trained) == len(set(trained))


def grid(**changed: float) -> dict[str, dict[str, float]]:
    """Results in the published order, but for `changed`."""
    values = {}
    for feature_map, shift in (("hedgehog", 0.0), ("t2r", 1.0)):
        for window, gain in (("none", 0.0), ("terraced", 1.5), ("sliding", 1.5)):
            for kind, final, before in (("no transfer", 9.0, 2448.0), ("transfer", 4.0, 60.9)):
                label = f"{feature_map}, {window}, query_head, {kind}"
                values[label] = {"before": before + shift, "after": final + shift - gain}
    for label, value in changed.items():
        values[label]["after"] = value
    return values


def test_the_ordering_holds_where_it_does_and_says_where_not() -> None:
    assert all(claim.holds for claim in published_ordering(grid(), BASE))
    worse = published_ordering(grid(**{"t2r, sliding, query_head, transfer": 30.0}), BASE)
    assert [claim.holds for claim in worse] == [True, True, True, False]
    assert "30 < 5" in worse[3].numbers
    diverged = grid()
    diverged["hedgehog, none, query_head, transfer"]["after"] = None  # type: ignore[assignment]
    assert [claim.holds for claim in published_ordering(diverged, BASE)] == [True, False, False, True]

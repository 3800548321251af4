"""The ablation's rows, one row from start to end, and when the published ordering is said to hold."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import FinetuneParams, TransferParams
from lolcats_core.experiments import ablation
from lolcats_core.experiments.ablation import (
    Budget,
    Row,
    Setting,
    base_of,
    check_sections,
    kept_rows,
    projections,
    rows,
    run,
    run_row,
)
from lolcats_core.experiments.ablation_report import markdown, published_ordering, report_on
from tests.core.tiny import FakeRows, tiny_teacher

BASE = LinearizeConfig(window_size=8, feature_dim=8)
BUDGET = Budget(steps=2, batch_size=2, eval_rows=2, recall_gap=8, recall_samples=2)
FINETUNE = FinetuneParams(lr=1e-3)


def setting(scratch: Path) -> Setting:
    return Setting(
        teacher=tiny_teacher(),
        train_rows=FakeRows(),
        validation_rows=FakeRows(rows=4, seed=1),
        linearize=BASE,
        transfer=TransferParams(),
        finetune=FINETUNE,
        budget=BUDGET,
        seed=0,
        scratch=scratch,
    )


def test_the_grid_is_complete_and_the_other_rows_leave_the_published_recipe_in_one_thing() -> None:
    sets = projections(tiny_teacher(), FINETUNE.target_modules)
    found = rows(BASE, FINETUNE, BUDGET, sets)
    grid = [row for row in found if row.section == "grid"]
    assert len(grid) == len({row.key() for row in grid}) == 2 * 3 * 2 * 2
    assert all(row.linearize.feature_map_bias == (row.linearize.feature_map == "t2r") for row in grid)
    published = base_of(BASE, FINETUNE, BUDGET)
    assert published.key() in {row.key() for row in grid}
    for section in ("lora_rank", "projections", "window_size", "transfer_steps"):
        chosen = [row for row in found if row.section == section]
        for row in chosen:
            values = vars(dataclasses.replace(row, section="", label="")), vars(published)
            apart = [key for key in values[0] if key not in ("section", "label") and values[0][key] != values[1][key]]
            assert len(apart) <= 1, row
    assert [row.linearize.window_size for row in found if row.section == "window_size"] == [4, 8, 16, 32, 64, 128, 256]
    assert ("q_proj", "k_proj") in sets
    assert set(sets[-1]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(UserError, match=r"a section must be one of grid, .* got 'grids'"):
        check_sections(["lora_rank", "grids"])


def test_ours_keeps_softmax_where_the_transfer_error_is_largest() -> None:
    found = kept_rows(base_of(BASE, FINETUNE, BUDGET), {0: 0.2, 1: 0.1, 2: 0.9})
    assert [row.linearize.softmax_layers for row in found] == [(), (2,), (0, 2)]
    assert found[1].label == "softmax kept in layer 2"


def test_a_row_is_trained_once_and_shares_its_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[Any] = []
    original = ablation.attention_transfer
    monkeypatch.setattr(ablation, "attention_transfer", lambda *a, **k: (transfers.append(1), original(*a, **k))[1])
    shared = setting(tmp_path)
    published = base_of(BASE, FINETUNE, BUDGET)
    before = {name: p.clone() for name, p in shared.teacher.state_dict().items()}
    first = run_row(published, shared)
    assert run_row(published, shared) == first
    other_rank = run_row(dataclasses.replace(published, lora_rank=2), shared)
    assert len(transfers) == 1
    assert other_rank["before"] == first["before"]
    assert first["tokens"] == 2 * 2 * 2 * 40
    without = run_row(dataclasses.replace(published, transfer_steps=0), shared)
    assert len(transfers) == 1
    assert without["tokens"] == first["tokens"]
    assert set(first["layer_errors"]) == {"0", "1", "2"}
    # Rows share the teacher's weights, so none of them may change it.
    assert all((before[name] == p).all() for name, p in shared.teacher.state_dict().items())


def test_a_row_that_diverges_is_said_to_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ablation.low_rank_finetune

    def diverging(student: Any, *rest: Any, **named: Any) -> Any:
        if rest[2].lora_rank == 4:  # weights that overflow, as a learning rate that is too high leaves them
            student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight * math.nan, requires_grad=False)
        return original(student, *rest, **named)

    monkeypatch.setattr(ablation, "low_rank_finetune", diverging)
    shared = setting(tmp_path)
    results = run(shared, ["lora_rank"])
    assert [row["label"] for row in results if row["after"] is None] == ["rank 4"]
    bad, *good = results
    assert bad["before"] is not None
    assert all(row["recall"] is not None and math.isfinite(row["after"]) for row in good)
    assert run(shared, ["lora_rank"]) == results
    assert "| rank 4 |" in markdown(report_on(shared, "tiny", results))
    assert "| diverged | diverged |" in markdown(report_on(shared, "tiny", results))


def test_a_transfer_that_diverges_leaves_a_row_without_measurements(tmp_path: Path) -> None:
    shared = dataclasses.replace(setting(tmp_path), transfer=TransferParams(lr=3e37, max_grad_norm=1e38))
    results = run(shared, ["softmax_layers"])
    # Without errors there is nothing to choose kept layers by.
    assert [row["label"] for row in results] == ["published recipe"]
    assert [results[0][name] for name in ("before", "after", "recall")] == [None] * 3


def test_processes_over_one_scratch_directory_share_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    original = ablation._measure

    def counted(row: Row, *rest: Any) -> Any:
        trained.append(row.label)
        return original(row, *rest)

    monkeypatch.setattr(ablation, "_measure", counted)
    results: list[Any] = [None, None]

    def work(number: int) -> None:
        results[number] = run(setting(tmp_path), ["lora_rank", "softmax_layers"])

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

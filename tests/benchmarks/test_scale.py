"""The benchmarks of large shapes check before they measure, and outlive a case that fails."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import case as cases
from benchmarks import parallel, scale
from benchmarks.case import Case, beside_plan, held_against_plan, launch
from benchmarks.random_weights import SHAPES, Repeated, write_random
from benchmarks.scale import check_streamed, run_case
from lolcats_core.estimation.cost import plan
from tests.tasks.processes import LAST_RESORT

ROOT = Path(__file__).parents[2]


def options(work: Path, **changes: object) -> argparse.Namespace:
    values = {"tiny": True, "layers": 2, "rows": 8, "length": 160, "batch": 4, "device": "cpu", "profile": False}
    return argparse.Namespace(**{**values, "work": work, "row": work / "row.json", **changes})


def test_streamed_is_compared_with_joint_and_a_wrong_result_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_streamed(tmp_path, torch.device("cpu")) < 1e-5
    monkeypatch.setattr(scale, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="nothing was timed"):
        check_streamed(tmp_path, torch.device("cpu"))


def test_random_weights_are_a_checkpoint_that_transformers_loads_and_grow_by_the_layers_that_lack(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    for layers in (1, 3):
        write_random(replace(SHAPES["tiny"], layers=layers), folder, torch.device("cpu"), torch.bfloat16)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(Repeated(folder, 2)[name.format(5)], Repeated(folder, 3)[name.format(1)])


@pytest.mark.parametrize("case", ["streamed_70b", "joint_8b", "finetune_8b_quantized", "finetune_8b_65536_segments"])
def test_each_kind_of_case_has_a_row(tmp_path: Path, case: str) -> None:
    run_case(options(tmp_path, case=case))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["case"] == case
    assert row["tokens_per_second"] > 0
    assert (row["layers"], row["of_layers"]) == (2, 3)


def test_a_streamed_row_says_where_its_time_went_and_its_profile_lies_beside_it(tmp_path: Path) -> None:
    run_case(options(tmp_path, case="streamed_8b", profile=True))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["parts"].keys() == {"reading weights", "training", "validation", "propagation"}
    assert sum(row["parts"].values()) == pytest.approx(row["seconds_per_layer"], abs=0.01)
    assert row["step_ms"] == pytest.approx(1e3 * row["parts"]["training"] / 4, rel=0.1)
    text = (tmp_path / "row.profile.txt").read_text()
    assert "by the host's own time" in text
    assert "aten::" in text


def test_the_plan_beside_a_row_is_that_of_the_measured_shape_and_of_the_whole_models_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    params = Case("cpu", tmp_path, tiny=True).params(1024, 8)
    whole = SHAPES["70b"]
    part = replace(whole, layers=4)
    expected = [
        next(c for c in plan(params, shape, cases.TOKENS, 1, "h200") if (c.stage, c.mode) == ("transfer", "streamed"))
        for shape in (part, whole)
    ]
    found = beside_plan(params, part, whole, "transfer", "streamed")
    assert found["planned_gib"] == pytest.approx(expected[0].memory / 2**30, abs=0.01)
    assert found["planned_hours"] == pytest.approx(expected[1].seconds / 3600, abs=0.01)


def test_a_row_is_held_against_the_plan_where_it_has_both() -> None:
    row = {"peak_gib": 11.0, "planned_gib": 10.0, "hours": 3.0, "planned_hours": 4.0}
    assert held_against_plan(row) == {"memory_over_plan": 1.1, "hours_over_plan": 0.75}
    assert held_against_plan({**row, "planned_hours": None}) == {"memory_over_plan": 1.1}
    assert held_against_plan({"failed": "no time left"}) == {}


def test_a_case_that_fails_or_takes_too_long_is_a_row_that_says_so(tmp_path: Path) -> None:
    broken = launch("benchmarks.scale", "joint_8b", ["--device", "cuda:7"], work=tmp_path, limit=LAST_RESORT)
    assert "this machine has" in broken["failed"]
    late = launch("benchmarks.scale", "joint_8b", [], work=tmp_path, limit=0.2)
    assert late == {"case": "joint_8b", "gpus": 1, "failed": "not done within 0.2 s"}


def test_every_case_gets_the_command_line_and_what_is_left_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Any, ...]] = []

    def fake(module: str, name: str, arguments: list[str], **options: Any) -> dict[str, Any]:
        launched.append((module, name, arguments, options["gpus"], options["limit"] <= 50))
        return {"case": name}

    monkeypatch.setattr(cases, "launch", fake)
    parser = cases.case_parser("", ("a", "b"), total=100.0)
    parser.add_argument("--rows", type=int)
    given = parser.parse_args(["--tiny", "--layers", "2", "--device", "cpu", "--rows", "3"])
    jobs: list[cases.Job] = [("a", 1, []), ("b", 2, ["--dies"])]
    with cases.workspace(given, "test-"):
        folder = given.work
        assert folder.is_dir()
        assert list(cases.run_cases("m", jobs, given, ["rows"], time.perf_counter() - 50)) == [
            {"case": "a"},
            {"case": "b"},
        ]
        late = list(cases.run_cases("m", jobs, given, ["rows"], time.perf_counter() - 100))
    assert not folder.exists()
    shared = ["--tiny", "--layers", "2", "--length", "1024", "--device", "cpu", "--rows", "3"]
    assert launched == [("m", "a", shared, 1, True), ("m", "b", [*shared, "--dies"], 2, True)]
    assert [row["failed"] for row in late] == ["no time left"] * 2
    given.work = tmp_path / "named"
    with cases.workspace(given, "test-"):
        pass
    assert given.work.is_dir()


def test_curves_are_compared_step_by_step() -> None:
    expected = [[1, 2.0], [2, 1.0]]
    assert parallel.difference([[1, 2.0], [2, 1.01]], expected) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="different steps"):
        parallel.difference([[1, 2.0]], expected)
    row = {"stages": {"joint": {"curve": expected, "tokens_per_second": 10.0}}}
    faster = {"stages": {"joint": {"curve": [[1, 2.0], [2, 1.01]], "tokens_per_second": 15.0}}}
    found = parallel.compared({"stages-1": row, "stages-2": faster}, 2)
    assert [(f["equal"], f["speedup"], f["efficiency"]) for f in found] == [(False, 1.5, 0.75)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_are_measured_and_compared_with_one_and_continue_its_checkpoints(tmp_path: Path) -> None:
    command = ["--tiny", "--device", "cpu", "--length", "160", "--micro", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.parallel", *command, "--limit", "1500", "--total", "3000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "parallel.json").read_text())
    assert not [row for row in found["rows"] if "failed" in row]
    assert [row["killed"] for row in found["rows"] if "killed" in row] == [True, True]
    assert {row["comparison"] for row in found["comparisons"]} == {
        *("joint", "finetune", "streamed"),
        *(f"resume-continued{way}, {stage}" for way in ("2by1", "1by2") for stage in ("transfer", "finetune")),
    }
    assert all(row["difference"] < 1e-5 for row in found["comparisons"])
    assert "finetun" in (tmp_path / "out" / "parallel.log").read_text()

"""The benchmark of large shapes checks before it measures, and outlives a case that fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import scale
from benchmarks.case import launch
from benchmarks.random_weights import SHAPES, write_random
from benchmarks.scale import check_streamed, run_case


def options(work: Path, **changes: object) -> argparse.Namespace:
    values = {
        "shape": "tiny",
        "layers": 2,
        "rows": 8,
        "length": 64,
        "batch": 4,
        "device": "cpu",
        "gpus": 1,
        "limit": 60,
    }
    return argparse.Namespace(**{**values, "limit": 60, "work": work, "row": work / "row.json", **changes})


def test_streamed_is_compared_with_joint_and_a_wrong_result_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_streamed(tmp_path, torch.device("cpu")) < 1e-5
    monkeypatch.setattr(scale, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="nothing was timed"):
        check_streamed(tmp_path, torch.device("cpu"))


def test_random_weights_are_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    write_random(SHAPES["tiny"], tmp_path / "model", torch.device("cpu"), torch.bfloat16)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("case", ["streamed_70b", "joint_8b", "finetune_8b_quantized", "finetune_8b_65536_segments"])
def test_each_kind_of_case_has_a_row(tmp_path: Path, case: str) -> None:
    run_case(options(tmp_path, case=case))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["case"] == case
    assert row["tokens_per_second"] > 0
    assert (row["layers"], row["of_layers"]) == (2, 3)


def test_a_case_that_fails_or_takes_too_long_is_a_row_that_says_so(tmp_path: Path) -> None:
    broken = launch("joint_8b", options(tmp_path), ["--device", "cuda:7"])
    assert "this machine has" in broken["failed"]
    late = launch("joint_8b", options(tmp_path, limit=0.2), [])
    assert late == {"case": "joint_8b", "failed": "not done within 0.2 s"}

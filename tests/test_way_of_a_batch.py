"""The way of the demo's batch, from stage `transfer` to the kernel, is as short as docs/architecture.md says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from lolcats_common.params import apply_overrides, params_from_dict, read_yaml
from lolcats_core.data.rows import TokenRowsWriter
from lolcats_core.teacher.pin import resolve_teacher, write_pin
from tasks import transfer
from tasks.runner.stage import Stage, Untracked

ROOT = Path(__file__).parents[1]
FOLDERS = ("lolcats_common/", "lolcats_core/", "kernels/", "tasks/")
# params.yaml but for how much there is of everything.
SMALL = {
    "compute.device": "cpu",
    "data.sequence_length": 160,
    "transfer.batch_size": 1,
    "transfer.max_steps": 1,
    "transfer.max_eval_rows": 1,
}
# Bounds that a change may lower. To raise one, ask first whether two modules hold one idea, or one only hands on.
ENTERED, STACKED = 27, 7


class Way:
    """The project's modules that a run enters before the kernel, and those that wait for it in a training step."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.stacked: list[str] = []
        self.arrived = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        module = self.module(frame)
        if event != "call" or module is None:
            return
        if not self.arrived and module not in self.entered:
            self.entered.append(module)
        if frame.f_code.co_name == "chunked_forward":  # what computes the operator on a CPU
            self.arrived = True
            stack = list(dict.fromkeys(self.stack(frame)))[::-1]
            self.stacked = self.stacked or (stack if "lolcats_core/training/loop.py" in stack else [])

    def stack(self, frame: FrameType | None) -> list[str]:
        found = []
        while frame is not None:
            found += [name for name in [self.module(frame)] if name is not None]
            frame = frame.f_back
        return found

    @staticmethod
    def module(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        return name if name.startswith(FOLDERS) else None


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    """Of the built-in teacher and rows of random tokens."""
    root = tmp_path_factory.mktemp("project")
    params = params_from_dict(apply_overrides(read_yaml(ROOT / "params.yaml"), SMALL))
    pin = resolve_teacher(params.teacher, root)
    (root / "outputs" / "teacher").mkdir(parents=True)
    write_pin(pin, root, root / "outputs" / "teacher")
    draws, length = np.random.default_rng(0), params.data.sequence_length
    for name in ("train", "validation"):
        folder = root / "outputs" / "prepare" / name
        with TokenRowsWriter(folder, sequence_length=length, vocab_size=pin.vocab_size) as writer:
            writer.append(input_ids=draws.integers(0, pin.vocab_size, (1, length)))
    (root / "out").mkdir()
    stage, way = Stage("transfer", root, params, root / "out", root / "scratch", Untracked()), Way()
    earlier = sys.getprofile()
    sys.setprofile(way)
    try:
        transfer.run(stage)
    finally:
        sys.setprofile(earlier)
    return way


def test_a_batch_passes_few_modules_from_the_stage_to_the_kernel(way: Way) -> None:
    assert way.arrived
    assert len(way.entered) <= ENTERED, way.entered
    assert way.stacked[0] == "tasks/transfer.py"
    assert len(way.stacked) <= STACKED, way.stacked


def test_the_architecture_document_names_the_modules_on_the_way(way: Way) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("### Every module on the way")[2].partition("\n## ")[0]
    table = "".join(line for line in section.splitlines() if line.startswith("|"))
    assert sorted(re.findall(r"`([\w/]+\.py)`", table)) == sorted(way.entered)

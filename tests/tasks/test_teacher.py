"""The stage `teacher` writes the pin and the tokenizer, and refuses in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.params import params_from_dict
from lolcats_core.teacher.pin import Teacher
from tasks.teacher import run


def stage(root: Path, **teacher: object) -> Any:
    out = root / "outputs" / "teacher"
    out.mkdir(parents=True)
    return SimpleNamespace(root=root, out=out, params=params_from_dict({"teacher": teacher}))


def test_the_stage_writes_a_pin_that_later_stages_load(tmp_path: Path) -> None:
    started = stage(tmp_path, source="builtin")
    metrics = run(started)
    pin = Teacher.open(started.out).pin
    assert sorted(path.name for path in started.out.iterdir()) == ["teacher.json", "tokenizer"]
    assert metrics == {
        "parameters": pin.parameters,
        "layers": pin.layers,
        "vocab_size": pin.vocab_size,
        "bytes": pin.bytes,
    }
    tokenizer = Teacher.open(started.out).tokenizer()
    model = Teacher.open(started.out).load(torch.float32, "cpu")
    ids = torch.tensor([tokenizer("import os\nimport sys\n\n\ndef main(")["input_ids"]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5  # a uniform guess over 4096 tokens is 8.3


def test_the_same_teacher_gives_the_same_outputs(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        started = stage(tmp_path / name, source="builtin")
        run(started)
        contents.append({p.relative_to(started.out): p.read_bytes() for p in started.out.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]


def test_a_teacher_that_cannot_be_used_stops_the_stage_and_leaves_nothing(tmp_path: Path) -> None:
    started = stage(tmp_path, source="./missing")
    with pytest.raises(UserError, match="no such directory"):
        run(started)
    assert not list(started.out.iterdir())

"""The first two stages take a teacher from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import constants

from lolcats_common.files import sha256_file
from lolcats_common.params import params_from_dict
from lolcats_core.model.modeling import linearize
from lolcats_core.teacher.pin import Teacher
from tasks import inputs, teacher
from tasks.runner.stage import Stage, Untracked
from tests.core.teacher.test_gguf import teacher as gguf_teacher
from tests.core.teacher.test_gguf import write
from tests.core.tiny import SETTINGS, tokens


def test_the_stages_inputs_and_teacher_take_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    source = write(tmp_path / "m.gguf", gguf_teacher(), Kind.Q8_0)
    params = params_from_dict({"teacher": {"source": "m.gguf"}})
    for name, run in (("inputs", inputs.run), ("teacher", teacher.run)):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        stage = Stage(name, tmp_path, params, tmp_path / "outputs" / name, tmp_path / ".scratch" / name, Untracked())
        metrics = run(stage)
    assert metrics["layers"] == 2
    listed = json.loads((tmp_path / "outputs" / "inputs" / "teacher.json").read_text())
    assert (listed["kind"], listed["files"]) == ("gguf", {"m.gguf": sha256_file(source)})
    found = Teacher.open(tmp_path / "outputs" / "teacher")
    student = linearize(found.load(torch.float32, "cpu"), SETTINGS)
    assert torch.isfinite(student(tokens(1, 40)).logits).all()

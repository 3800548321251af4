"""Weights that are NaN, infinite or stored as integers are refused by the tensor's name, wherever they come in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file
from lolcats_core.compute import numbers
from lolcats_core.model.map_files import load_feature_maps, save_feature_maps
from lolcats_core.teacher.checks import WEIGHTS
from lolcats_core.teacher.pin import Teacher
from tasks.cli.generation import Generator, Sampling
from tests.core.teacher.test_pin import make_teacher, pinned, resolve
from tests.core.tiny import byte_teacher, byte_tokenizer

NAME = "model.layers.1.mlp.up_proj.weight"


def spoil(file: Path, name: str, value: float) -> None:
    """Set one value of a tensor."""
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})


def relabel(file: Path, name: str, dtype: str) -> None:
    """Say in the header that a tensor has another dtype of its size."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = dtype
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_that_is_not_finite_is_refused_when_it_is_pinned_and_when_it_is_loaded(
    tmp_path: Path, value: float
) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    out = pinned(teacher, tmp_path)
    spoil(teacher / WEIGHTS, NAME, value)
    message = rf"teacher {teacher}: {WEIGHTS}: the tensor {NAME} holds NaN or infinite values"
    with pytest.raises(UserError, match=message):
        resolve(teacher, tmp_path)
    # A pin from before teachers were looked at.
    pin = json.loads((out / "teacher.json").read_text())
    pin["files"][WEIGHTS] = sha256_file(teacher / WEIGHTS)
    (out / "teacher.json").write_text(json.dumps(pin))
    with pytest.raises(UserError, match=message):
        Teacher.open(out).load(torch.float32, "cpu")
    with pytest.raises(UserError, match=message):
        _ = Teacher.open(out).folder  # from which streaming reads


def test_a_relabelled_dtype_is_refused_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    relabel(teacher / WEIGHTS, NAME, "I32")
    monkeypatch.setattr(numbers, "check_finite", lambda *arguments: pytest.fail("values were read"))
    with pytest.raises(UserError, match=rf"quantized weights cannot be linearized \({NAME} is I32\)"):
        resolve(teacher, tmp_path)


def test_a_student_that_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    student = lc.linearize(byte_teacher(), lc.LinearizeConfig(window_size=16, feature_dim=8))
    student.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    name = next(name for name in load_file(tmp_path / "model" / WEIGHTS) if "down_proj" in name)
    spoil(tmp_path / "model" / WEIGHTS, name, float("nan"))
    with pytest.raises(UserError, match=rf"the tensor {name} holds NaN"):
        Generator(tmp_path / "model", Sampling(1))
    maps = tmp_path / "maps.safetensors"
    next(p for n, p in student.named_parameters() if "feature_maps" in n).data.fill_(float("inf"))
    save_feature_maps(student, maps)
    with pytest.raises(UserError, match=rf"{maps}: the tensor .*feature_maps\S+ holds NaN or infinite"):
        load_feature_maps(student, maps)


def test_values_are_looked_at_a_piece_at_a_time_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PIECE", 7)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        values = torch.ones(4, 5).to(dtype)
        save_file({"w": values, "attn.bias": torch.ones(2, dtype=torch.bool)}, tmp_path / "a.safetensors")
        numbers.check_folder(tmp_path, "x")
        values = torch.ones(4, 5)
        values[-1, -1] = torch.nan
        save_file({"w": values.to(dtype)}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=r"^x: a\.safetensors: the tensor w holds NaN"):
            numbers.check_folder(tmp_path, "x")

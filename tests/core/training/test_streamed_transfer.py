"""Streamed stage 1: the joint mode's result, one layer in memory, and the same bytes wherever it was killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import TransferParams
from lolcats_core.model.modeling import linearize, named_map_parameters
from lolcats_core.streaming import buffer as buffers
from lolcats_core.streaming.buffer import DATA, HiddenBuffer
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.training.attention_transfer import attention_transfer, head_errors
from lolcats_core.training.streamed_transfer import streamed_attention_transfer
from tests.core.tiny import MIXED, SETTINGS, FakeRows, tiny_teacher
from tests.core.training.test_loop import with_one_bit_flipped

CPU = torch.device("cpu")
# No clipping, no plateau and the last step as the best: what the two modes decide alike.
EQUAL = TransferParams(
    batch_size=4, epochs=2, eval_every=100, checkpoint_every=2, log_every=2, max_eval_rows=8, max_grad_norm=1e9
)
BLOCK_BYTES = 4 * 40 * 32 * 4  # one batch of four rows


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(folder, max_shard_size="20KB")
    return folder


def streamed(folder: Path, scratch: Path, settings: LinearizeConfig = SETTINGS, **options: Any) -> Any:
    rows = options.pop("rows", None) or FakeRows(24)
    params = options.pop("params", EQUAL)
    config = AutoConfig.from_pretrained(folder)
    dtype = options.pop("dtype", torch.float32)
    validation = FakeRows(8, seed=1, documents=rows.documents)
    student = LayerwiseModel.open(folder, config, settings=settings, device=CPU, dtype=dtype)
    options = {"block_bytes": BLOCK_BYTES} | options
    return streamed_attention_transfer(student, rows, validation, params, scratch=scratch, **options)


@pytest.mark.parametrize(
    ("family", "settings", "documents", "below"),
    [
        ("llama", SETTINGS, False, None),
        ("llama", MIXED, True, None),
        ("llama", MIXED, False, 200),
        ("llama", MIXED, True, 200),
        ("llama", dataclasses.replace(MIXED, feature_map_init="calibrated"), True, None),
        ("gemma3_text", SETTINGS, False, None),
        ("gpt_neox", MIXED, False, None),
    ],
)
def test_the_maps_are_those_of_the_joint_mode(
    tmp_path: Path, family: str, settings: LinearizeConfig, documents: bool, below: int | None
) -> None:
    teacher = tiny_teacher(family)
    teacher.save_pretrained(tmp_path / "teacher")
    student = linearize(teacher, settings)
    rows = FakeRows(24, documents=documents, below=below)
    validation = FakeRows(8, seed=1, documents=documents)
    joint = attention_transfer(student, rows, validation, EQUAL, scratch=tmp_path / "joint")
    maps, result, errors = streamed(tmp_path / "teacher", tmp_path / "streamed", settings, rows=rows)
    expected = named_map_parameters(student)
    assert maps.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-4, atol=1e-5)
    assert (result.steps, result.tokens, result.best_step) == (joint.steps, joint.tokens, joint.best_step)
    assert result.best_loss == pytest.approx(joint.best_loss, rel=1e-5)
    measured = head_errors(student, validation, 8, batch_size=4)
    assert errors.keys() == measured.keys()
    for layer, each in measured.items():
        assert errors[layer] == {name: pytest.approx(values, rel=1e-3) for name, values in each.items()}
    for mine, theirs in zip(result.history, joint.history, strict=True):
        for name in (n for n in theirs if "loss" in n or "layer_" in n):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_with_the_published_clipping_and_schedule_the_loss_is_close_to_the_joint_modes(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    params = TransferParams(batch_size=4, epochs=4, eval_every=4, checkpoint_every=99, max_eval_rows=8)
    student = linearize(teacher, SETTINGS)
    joint = attention_transfer(student, FakeRows(24), FakeRows(8, seed=1), params, scratch=tmp_path / "joint")
    _, result, _ = streamed(tmp_path / "teacher", tmp_path / "streamed", params=params)
    before = joint.history[0]["validation_loss"]
    assert (before - result.best_loss) == pytest.approx(before - joint.best_loss, rel=0.1)


def test_only_some_steps_need_only_their_rows(teacher_folder: Path, tmp_path: Path) -> None:
    streamed(teacher_folder, tmp_path, params=dataclasses.replace(EQUAL, max_steps=2))
    key = json.loads((tmp_path / "hidden.json").read_text())["key"]
    assert key.startswith("16x40x32")  # 8 rows in 2 steps, 8 for validation


class Killed(Exception):
    pass


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The `count`-th write into the buffer stops in the middle, as a kill would stop it."""
    seen = {"writes": 0}
    write = HiddenBuffer.write

    def torn(self: HiddenBuffer, layer: int, rows: Any, hidden: torch.Tensor) -> None:
        seen["writes"] += 1
        if seen["writes"] == count:
            write(self, layer, rows, torch.full_like(hidden, float("nan")))
            raise Killed
        write(self, layer, rows, hidden)

    monkeypatch.setattr(HiddenBuffer, "write", torn)


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_killed_in_any_write_of_the_buffer_it_ends_in_the_same_bytes(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    options = {"rows": FakeRows(8), "params": dataclasses.replace(EQUAL, epochs=1, max_eval_rows=4, buffer=kept)}
    expected, _, _ = streamed(teacher_folder, tmp_path / "whole", **options)
    writes = 3 * 3  # the embedding's and two layers' outputs of 12 rows by four
    for count in range(1, writes + 1, 1 if kept == "disk" else 4):
        scratch = tmp_path / str(count)
        with monkeypatch.context() as patch:
            fail_at(patch, count)
            with pytest.raises(Killed):
                streamed(teacher_folder, scratch, **options)
        actual, _, _ = streamed(teacher_folder, scratch, **options)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), count


def _kill_itself(folder: Path, scratch: Path, count: int) -> None:
    """In a process of its own: SIGKILL in the middle of a write."""
    write, seen = HiddenBuffer.write, [0]

    def torn(self: HiddenBuffer, layer: int, rows: Any, hidden: torch.Tensor) -> None:
        seen[0] += 1
        if seen[0] == count:
            hidden[:2] = float("nan")
        write(self, layer, rows, hidden)
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    HiddenBuffer.write = torn  # type: ignore[method-assign]
    streamed(folder, scratch)


def test_a_process_killed_while_it_overwrites_the_buffer_continues_to_the_same_bytes(
    teacher_folder: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_kill_itself, args=(teacher_folder, tmp_path, 13))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((tmp_path / "hidden.json").read_text())["layer"] == 1
    actual, _, _ = streamed(teacher_folder, tmp_path)
    expected, _, _ = streamed(teacher_folder, tmp_path / "whole")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("count", [3, 12, 20])
def test_killed_between_the_rows_and_the_counter_it_ends_in_the_same_bytes(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    expected, _, _ = streamed(teacher_folder, tmp_path / "whole")
    seen = {"commits": 0}
    real = buffers._write

    def counter(path: Path, value: Any) -> None:
        seen["commits"] += 1
        if seen["commits"] == count:
            raise Killed
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "_write", counter)
        with pytest.raises(Killed):
            streamed(teacher_folder, tmp_path / "killed")
    actual, _, _ = streamed(teacher_folder, tmp_path / "killed")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [2, 8])
def test_killed_in_the_training_of_any_layer_it_ends_in_the_same_bytes(
    teacher_folder: Path, tmp_path: Path, layer: int, step: int
) -> None:
    expected, undisturbed, _ = streamed(teacher_folder, tmp_path / "whole")

    def log(metrics: dict[str, float], at: int) -> None:
        if at == step and f"train_layer_{layer:03d}" in metrics:
            raise Killed

    with pytest.raises(Killed):
        streamed(teacher_folder, tmp_path / "killed", log=log)
    logged: set[tuple[str, int]] = set()
    actual, result, _ = streamed(
        teacher_folder, tmp_path / "killed", log=lambda metrics, at: logged.update((name, at) for name in metrics)
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    # The whole curve of every layer: of what the killed run logged, nobody knows what arrived.
    assert logged == {(name, int(e["step"])) for e in result.history for name in e if "layer_" in name}
    assert [e.get("train_loss") for e in result.history] == [e.get("train_loss") for e in undisturbed.history]


def test_a_finished_layer_of_which_a_bit_was_flipped_is_named_and_not_used(
    teacher_folder: Path, tmp_path: Path
) -> None:
    streamed(teacher_folder, tmp_path)
    layer = tmp_path / "layer_001.pt"
    layer.write_bytes(with_one_bit_flipped(layer))
    with pytest.raises(
        UserError, match=r"layer_001\.pt: the checkpoint is damaged .*; delete .* to start stage 1 again"
    ):
        streamed(teacher_folder, tmp_path)


def test_the_buffer_is_one_block_larger_than_the_rows_and_bf16_keeps_bf16(teacher_folder: Path, tmp_path: Path) -> None:
    streamed(teacher_folder, tmp_path, dtype=torch.bfloat16, block_bytes=BLOCK_BYTES // 2)
    assert (tmp_path / DATA).stat().st_size == (32 + 4) * 40 * 32 * 2


def test_no_more_than_one_layer_ever_has_weights(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    forward = LayerwiseModel.forward_layer

    def watched(self: LayerwiseModel, *arguments: Any) -> Any:
        held.append([any(not p.is_meta for p in layer.parameters()) for layer in self.layers])
        assert all(
            p.is_meta for name, p in self.model.named_parameters() if ".layers." not in name
        )  # no embedding, no head
        return forward(self, *arguments)

    monkeypatch.setattr(LayerwiseModel, "forward_layer", watched)
    streamed(teacher_folder, tmp_path)
    assert {sum(layers) for layers in held} == {1}


def test_a_buffer_from_before_the_machine_restarted_is_not_trusted(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = streamed(teacher_folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 20)
        with pytest.raises(Killed):
            streamed(teacher_folder, tmp_path / "killed")
    with (tmp_path / "killed" / DATA).open("r+b") as file:  # what never reached the disk
        file.write(bytes(10_000))
    monkeypatch.setattr(buffers, "_boot_id", lambda: "another")
    actual, _, _ = streamed(teacher_folder, tmp_path / "killed")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_weights_that_are_missing_are_named(teacher_folder: Path, tmp_path: Path) -> None:
    deeper = AutoConfig.from_pretrained(teacher_folder, num_hidden_layers=4)
    rows = FakeRows(8)
    student = LayerwiseModel.open(teacher_folder, deeper, settings=SETTINGS, device=CPU, dtype=torch.float32)
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.3\."):
        streamed_attention_transfer(student, rows, rows, EQUAL, scratch=tmp_path)


def test_a_buffer_that_does_not_fit_is_refused_before_it_is_made(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"need 0\.0 GiB.*lower `data\.max_train_tokens`"):
        streamed(teacher_folder, tmp_path)
    assert not (tmp_path / DATA).exists()

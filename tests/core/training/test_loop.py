"""Training is deterministic, resumes bitwise wherever it was killed, and keeps the best weights."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import FinetuneParams, TransferParams
from lolcats_common.training_params import TrainingParams
from lolcats_core.model.modeling import empty_student, linearize, named_map_parameters
from lolcats_core.training.attention_transfer import (
    attention_transfer,
    evaluate_transfer,
    holds_documents,
    longest_document,
    transfer_losses,
)
from lolcats_core.training.loop import CHECKPOINT, learning_rate_scale, step_batches, total_steps, train
from lolcats_core.training.low_rank_finetune import (
    add_lora,
    check_target_modules,
    low_rank_finetune,
    next_token_loss,
)
from tests.core.tiny import FakeRows, tiny_teacher

SETTINGS = LinearizeConfig(window_size=8, feature_dim=8)
CPU = torch.device("cpu")


class Killed(Exception):
    pass


def params(**changes: Any) -> TransferParams:
    base = TransferParams(batch_size=4, epochs=2, eval_every=4, checkpoint_every=3, log_every=2, max_eval_rows=8)
    return dataclasses.replace(base, **changes)


def transfer(
    scratch: Path,
    die_at: int | None = None,
    seed: int = 0,
    logged: list[dict[str, float]] | None = None,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], Any]:
    student = linearize(tiny_teacher(), SETTINGS)

    def log(metrics: dict[str, float], step: int) -> None:
        if step == die_at and "train_loss" in metrics:
            raise Killed
        if logged is not None:
            logged.append({"step": step, **metrics})

    rows, validation = FakeRows(24), FakeRows(8, seed=1)
    result = attention_transfer(student, rows, validation, params(**changes), scratch=scratch, seed=seed, log=log)
    return {name: p.detach().clone() for name, p in named_map_parameters(student).items()}, result


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: v for name, v in entry.items() if name != "tokens_per_second"} for entry in history]


@pytest.mark.parametrize("die_at", [2, 4, 6, 10, 12])
def test_a_killed_run_ends_bitwise_where_an_undisturbed_one_does(tmp_path: Path, die_at: int) -> None:
    expected, undisturbed = transfer(tmp_path / "a")
    with pytest.raises(Killed):
        transfer(tmp_path / "b", die_at=die_at)
    logged: list[dict[str, float]] = []
    actual, resumed = transfer(tmp_path / "b", logged=logged)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert timeless(resumed.history) == timeless(undisturbed.history)
    # The whole curve: of what the killed run logged, nobody knows what arrived.
    assert timeless(logged) == timeless(undisturbed.history)
    assert (resumed.best_loss, resumed.best_step, resumed.tokens) == (
        undisturbed.best_loss,
        undisturbed.best_step,
        undisturbed.tokens,
    )


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    first, _ = transfer(tmp_path / "a")
    again, _ = transfer(tmp_path / "b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other, _ = transfer(tmp_path / "c", seed=1)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_finetuning_resumes_bitwise_with_dropout(tmp_path: Path) -> None:
    settings = FinetuneParams(
        batch_size=4, epochs=1, eval_every=2, checkpoint_every=2, log_every=1, lora_rank=2, lora_dropout=0.3, lr=1e-2
    )

    def run(scratch: Path, die_at: int | None) -> dict[str, torch.Tensor]:
        def log(metrics: dict[str, float], step: int) -> None:
            if step == die_at and "train_loss" in metrics:
                raise Killed

        student = linearize(tiny_teacher(), SETTINGS)
        model, _ = low_rank_finetune(student, FakeRows(24), FakeRows(8, seed=1), settings, scratch=scratch, log=log)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    expected = run(tmp_path / "a", None)
    with pytest.raises(Killed):
        run(tmp_path / "b", 5)
    actual = run(tmp_path / "b", None)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_transfer_lowers_the_error_and_changes_nothing_but_the_maps(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = linearize(teacher, SETTINGS)
    validation = FakeRows(8, seed=1)
    first = evaluate_transfer(student, validation, params(), CPU)
    attention_transfer(student, FakeRows(24), validation, params(epochs=8), scratch=tmp_path)
    last = evaluate_transfer(student, validation, params(), CPU)
    assert last["loss"] < 0.9 * first["loss"]
    shared = dict(student.named_parameters())
    assert all(torch.equal(shared[name], p) for name, p in before.items())
    assert {name for name, p in student.named_parameters() if p.requires_grad} == set(named_map_parameters(student))


def test_the_loss_is_a_thousand_times_the_mean_over_layers_of_the_mean_squared_error() -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    losses = transfer_losses(student, FakeRows(4).batch(range(4)), params())
    layers = [value for name, value in losses.items() if name.startswith("layer_")]
    assert len(layers) == 3
    assert torch.stack(layers).mean().item() * 1000 == pytest.approx(losses["loss"].item(), rel=1e-6)


def test_gradient_accumulation_equals_one_large_batch() -> None:
    batch = FakeRows(8).batch(range(8))
    gradients = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        student = linearize(tiny_teacher(dtype=torch.float64), SETTINGS)
        for part in parts:
            transfer_losses(student, {"input_ids": batch["input_ids"][part]}, params(), scale=1 / len(parts))
        gradients.append({name: p.grad for name, p in named_map_parameters(student).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("segment", [None, 16])
def test_a_step_is_a_mean_over_its_targets_however_it_is_divided_into_micro_batches(
    segment: int | None, tmp_path: Path
) -> None:
    """Rows of 39 to 16 targets, and some without any."""

    class Masked(FakeRows):
        def batch(self, indices: Any) -> dict[str, torch.Tensor]:
            first = torch.as_tensor(np.asarray(indices))[:, None]
            mask = (torch.arange(self.sequence_length)[None] > first) & (first % 5 > 0)
            return {**super().batch(indices), "loss_mask": mask}

    def run(batch_size: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
        settings = FinetuneParams(
            batch_size=batch_size,
            gradient_accumulation=8 // batch_size,
            epochs=1,
            log_every=1,
            lora_rank=2,
            lr=1e-2,
            segment_length=segment,
        )
        student, rows = linearize(tiny_teacher(dtype=torch.float64), SETTINGS), Masked(24)
        scratch = tmp_path / str(batch_size)
        model, result = low_rank_finetune(student, rows, rows, settings, scratch=scratch)
        logged = [(entry["train_loss"], entry["grad_norm"]) for entry in result.history if "train_loss" in entry]
        return logged, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    expected, weights = run(8)
    for size in (4, 1):
        logged, found = run(size)
        np.testing.assert_allclose(logged, expected, rtol=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_packed_documents_transfer_as_separate_documents() -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    rows = FakeRows(4, documents=True)
    packed = transfer_losses(student, rows.batch(range(4)), params())["loss"].item()
    ids, cut = rows.input_ids, rows.sequence_length // 3
    parts = [transfer_losses(student, {"input_ids": x}, params())["loss"].item() for x in (ids[:, :cut], ids[:, cut:])]
    total = (cut * parts[0] + (rows.sequence_length - cut) * parts[1]) / rows.sequence_length
    assert packed == pytest.approx(total, rel=1e-4)


def test_cross_entropy_of_weights_is_the_entropy_where_student_and_teacher_agree() -> None:
    student = linearize(tiny_teacher(), LinearizeConfig(window_size=32, feature_dim=8))
    batch = FakeRows(2, length=40).batch(range(2))
    only = transfer_losses(student, batch, params(mse_weight=0.0, xent_weight=1.0), scale=1.0)
    # All 40 tokens lie in the terraced window of 64, so the student's weights are the softmax weights.
    assert only["layer_000"].item() < 1e-10
    assert 0 < only["loss"].item() < np.log(40)


def test_cross_entropy_refuses_packed_documents(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    rows = FakeRows(8, documents=True)
    with pytest.raises(UserError, match=r"must be 0 with `data\.packing: documents`"):
        attention_transfer(student, rows, rows, params(xent_weight=1.0), scratch=tmp_path)


def test_a_row_s_place_changes_the_student_and_not_the_teacher(tmp_path: Path) -> None:
    student, near, far = linearize(tiny_teacher(), SETTINGS), FakeRows(4), FakeRows(4, below=240)
    batches = near.batch(range(4)), far.batch(range(4))
    with torch.no_grad():
        seen, moved = (tiny_teacher()(**batch).logits for batch in batches)
        torch.testing.assert_close(moved, seen, rtol=1e-4, atol=1e-4)
        seen, moved = (student(**batch).logits for batch in batches)
    assert float((moved - seen).norm() / seen.norm()) > 1e-3
    # One document a row, wherever it stands: every term of the loss takes it.
    assert not holds_documents(far)
    attention_transfer(student, far, near, params(xent_weight=1.0, max_steps=2), scratch=tmp_path)
    mixed = FakeRows(8, documents=True, below=200)
    mixed.places[:4] = 0  # type: ignore[index]
    assert holds_documents(mixed, at_once=2)


def test_lora_starts_as_the_identity_and_trains_only_projections() -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    batch = FakeRows(2).batch(range(2))
    before = next_token_loss(student, batch).item()
    model = add_lora(student, FinetuneParams(lora_rank=2), seed=0)
    assert next_token_loss(model, batch).item() == pytest.approx(before, abs=1e-6)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 4 * 2
    assert all("lora_" in name for name in trainable)


def test_finetuning_lowers_the_loss_and_merging_keeps_the_function(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    rows = FakeRows(8)
    settings = FinetuneParams(lr=1e-2, batch_size=4, epochs=10, eval_every=10, checkpoint_every=50)
    before = next_token_loss(student, rows.batch(range(8))).item()
    model, result = low_rank_finetune(student, rows, rows, settings, scratch=tmp_path)
    batch = rows.batch(range(8))
    with torch.no_grad():
        adapted = next_token_loss(model, batch).item()
        merged = next_token_loss(model.merge_and_unload(), batch).item()
    assert adapted < 0.9 * before
    assert merged == pytest.approx(adapted, rel=1e-5)
    assert result.best_loss == pytest.approx(adapted, rel=1e-4)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    settings = FinetuneParams(batch_size=4, epochs=1, eval_every=10, lora_rank=2)
    weights = []
    for on in (False, True):
        student = linearize(tiny_teacher(), SETTINGS)
        model, _ = low_rank_finetune(
            student, FakeRows(8), FakeRows(4), settings, scratch=tmp_path / str(on), gradient_checkpointing=on
        )
        weights.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_loss_counts_only_masked_targets_and_never_across_documents() -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    batch = FakeRows(2, documents=True).batch(range(2))
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[:, 5] = True
    one = next_token_loss(student, batch | {"loss_mask": mask})
    logits = student(input_ids=batch["input_ids"][:, :5], use_cache=False).logits[:, -1]
    torch.testing.assert_close(one, torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 5]))


def test_every_row_is_seen_once_per_epoch_in_an_order_that_changes() -> None:
    settings = TrainingParams(batch_size=4, gradient_accumulation=2, epochs=2)
    assert total_steps(21, settings) == 6
    epochs = [
        np.concatenate([np.concatenate(step_batches(21, settings, 0, step)) for step in range(first, first + 3)])
        for first in (0, 3)
    ]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


def _counting(losses: list[float], scratch: Path, settings: TrainingParams) -> tuple[nn.Parameter, Any, list[float]]:
    """Train one number by one per step; validation losses are given."""
    weight, lrs = nn.Parameter(torch.zeros(())), []
    queue = iter(losses)

    def step(batch: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        weight.grad = -torch.ones(())
        return {"loss": torch.zeros(())}

    def log(metrics: dict[str, float], step: int) -> None:
        if "lr" in metrics:
            lrs.append(metrics["lr"])

    result = train(
        trainable={"weight": weight},
        step=step,
        rows=FakeRows(100),
        params=settings,
        evaluate=lambda: {"loss": next(queue)},
        scratch=scratch,
        seed=0,
        device=CPU,
        log=log,
        label="counting",
        make_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=settings.lr),
    )
    return weight, result, lrs


def test_the_weights_of_the_lowest_validation_loss_stay(tmp_path: Path) -> None:
    settings = TrainingParams(lr=1.0, batch_size=1, max_steps=4, eval_every=1, log_every=1, schedule="constant")
    weight, result, _ = _counting([9.0, 5.0, 3.0, 4.0, 4.0], tmp_path, settings)
    assert (result.steps, result.best_step, result.best_loss) == (4, 2, 3.0)
    assert weight.item() == pytest.approx(2.0)


def test_reduce_on_plateau_divides_the_rate_after_patience_and_stops_at_the_floor(tmp_path: Path) -> None:
    settings = TrainingParams(
        lr=1e-2, batch_size=1, max_steps=7, eval_every=1, log_every=1, plateau_patience=1, min_lr=1e-4
    )
    _, _, lrs = _counting([1.0] * 8, tmp_path, settings)
    assert lrs == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4])


def test_cosine_warms_up_linearly_and_ends_at_the_floor() -> None:
    settings = TrainingParams(lr=1.0, schedule="cosine", warmup_steps=4, min_lr=0.1)
    scales = [learning_rate_scale(settings, step, 104) for step in (0, 3, 4, 54, 104)]
    assert scales == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1])


def with_one_bit_flipped(path: Path) -> bytes:
    """The bytes of a checkpoint, one bit in the middle of its largest tensor another."""
    with zipfile.ZipFile(path) as parts:
        largest = parts.read(max(parts.infolist(), key=lambda part: part.file_size))
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(largest) + len(largest) // 2] ^= 1
    return bytes(flipped)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped", "other"])
def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Killed):
        transfer(tmp_path, die_at=6)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    if damage == "other":
        with pytest.raises(UserError, match="of another run; delete it"):
            transfer(tmp_path, lr=0.5)
        return
    damages = {
        "cut": whole[: len(whole) // 2],
        "garbage": b"\0" * 99,
        "empty": b"",
        "flipped": with_one_bit_flipped(path),
    }
    path.write_bytes(damages[damage])
    with pytest.raises(UserError, match=r"checkpoint\.pt: the checkpoint is damaged"):
        transfer(tmp_path)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), SETTINGS)
    with torch.no_grad():
        next(iter(named_map_parameters(student).values())).fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan at step \d+; lower the learning rate"):
        attention_transfer(student, FakeRows(8), FakeRows(4), params(), scratch=tmp_path)


def test_no_rows_or_nothing_to_train_is_refused(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), LinearizeConfig(softmax_layers=(0, 1, 2)))
    with pytest.raises(UserError, match="nothing to train"):
        attention_transfer(student, FakeRows(8), FakeRows(4), params(), scratch=tmp_path)
    student = linearize(tiny_teacher(), SETTINGS)
    with pytest.raises(UserError, match="no training rows"):
        attention_transfer(student, FakeRows(0), FakeRows(4), params(), scratch=tmp_path)


@pytest.mark.parametrize(("window", "size"), [("terraced", 32), ("sliding", 64), ("none", 4)])
def test_rows_that_the_window_sees_whole_have_nothing_linear_and_are_refused(
    window: Any, size: int, tmp_path: Path
) -> None:
    settings = LinearizeConfig(window=window, window_size=size, feature_dim=8)
    for length, refused in ((64, window != "none"), (65, False)):
        student, rows = linearize(tiny_teacher(), settings), FakeRows(4, length=length)
        loss = transfer_losses(student, rows.batch(range(4)), params())["loss"].item()
        assert (loss < 1e-6) == refused
        if refused:
            with pytest.raises(UserError, match=rf"`data\.sequence_length` must be above 64 .*size` {size} .*got 64"):
                attention_transfer(student, rows, rows, params(max_steps=1), scratch=tmp_path)
        else:
            attention_transfer(student, rows, rows, params(max_steps=1), scratch=tmp_path / str(length))


def test_documents_that_the_window_sees_whole_are_refused_whatever_fills_their_rows(tmp_path: Path) -> None:
    rows = FakeRows(4, length=60, documents=True)  # of 20 and 40 tokens
    student = linearize(tiny_teacher(), LinearizeConfig(window="sliding", window_size=32, feature_dim=8))
    attention_transfer(student, rows, rows, params(max_steps=1), scratch=tmp_path)
    student = linearize(tiny_teacher(), LinearizeConfig(window_size=32, feature_dim=8))
    with pytest.raises(UserError, match=r"with `data\.packing: documents`\) must be above 64 tokens"):
        attention_transfer(student, FakeRows(4, length=90, documents=True), rows, params(), scratch=tmp_path)
    assert longest_document(rows, 1) == longest_document(rows, 99) == 40

    class Filled(FakeRows):
        def batch(self, indices: Any) -> dict[str, torch.Tensor]:
            batch = super().batch(indices)
            return {**batch, "loss_mask": torch.arange(self.sequence_length).expand(len(batch["input_ids"]), -1) < 20}

    assert longest_document(Filled(4, length=60, documents=True), 99) == 20


def test_unknown_target_modules_are_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"the model has no 'c_attn'; it has .*q_proj"):
        add_lora(linearize(tiny_teacher(), SETTINGS), FinetuneParams(target_modules=("c_attn",)), seed=0)


@pytest.mark.parametrize("meta", [False, True])
def test_an_output_embedding_that_is_the_input_embedding_is_no_target(meta: bool) -> None:
    teacher, wanted = tiny_teacher(tie_word_embeddings=True), FinetuneParams(target_modules=("q_proj", "lm_head"))
    with torch.device("meta" if meta else "cpu"):
        student = empty_student(teacher.config, SETTINGS) if meta else linearize(teacher, SETTINGS)
    with pytest.raises(UserError, match=r"must leave 'lm_head' alone, which this teacher ties .*it may name .*q_proj"):
        check_target_modules(student, wanted)
    check_target_modules(linearize(tiny_teacher(), SETTINGS), wanted)

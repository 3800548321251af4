"""Long rows: sliced logits and segments change memory, not the function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams
from lolcats_core.model.families import FAMILIES
from lolcats_core.training import losses, segments
from lolcats_core.training.losses import output_logits
from lolcats_core.training.low_rank_finetune import add_lora, low_rank_finetune, next_token_loss
from lolcats_core.training.segments import segmented_loss
from tests.core.tiny import MIXED, SETTINGS, FakeRows, tiny_student


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states_are_the_models(family: str) -> None:
    student = tiny_student(family)
    ids = FakeRows(2).input_ids
    with torch.no_grad():
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(output_logits(student, hidden), student(ids, use_cache=False).logits)


def test_sliced_logits_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(tiny_student("gemma2"), FinetuneParams(lora_rank=2), seed=0)
    batch = FakeRows(3, documents=True).batch(range(3))
    loss = next_token_loss(model, batch)
    loss.backward()
    expected = gradients(model)
    monkeypatch.setattr(losses, "MAX_FLOAT_LOGITS", 97 * 3 * 7)
    sliced = next_token_loss(model, batch)
    sliced.backward()
    torch.testing.assert_close(sliced, loss)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [SETTINGS, MIXED], ids=["linear", "mixed"])
@pytest.mark.parametrize("length", [13, 16, 39, 40])
@pytest.mark.parametrize("below", [None, 200], ids=["from_0", "placed"])
def test_the_loss_by_segments_is_that_of_the_whole_rows(settings: Any, length: int, below: int | None) -> None:
    student = tiny_student(settings=settings)
    batch = FakeRows(3, below=below).batch(range(3))
    with torch.no_grad():
        expected = next_token_loss(student, batch)
    torch.testing.assert_close(segmented_loss(student, batch, length, None), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_exact_inside_a_segment_and_none_pass_through_the_state() -> None:
    model = add_lora(tiny_student("qwen3", SETTINGS), FinetuneParams(lora_rank=2), seed=0)
    with torch.no_grad():  # LoRA starts as the identity, where half of its gradients are zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = FakeRows(2).batch(range(2))
    next_token_loss(model, batch).backward()
    whole = gradients(model)
    segmented_loss(model, batch, 40, 1.0)
    one = gradients(model)
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)
    segmented_loss(model, batch, 16, 1.0)
    several = gradients(model)
    # The rest of the gradient is what the state would carry: most, but not all of it, is there.
    error = sum((several[n] - v).square().sum() for n, v in whole.items()).sqrt()
    size = sum(v.square().sum() for v in whole.values()).sqrt()
    assert 1e-4 < error / size < 0.9


def test_finetuning_by_segments_learns_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    rows = FakeRows(8)
    params = FinetuneParams(lr=1e-2, batch_size=4, epochs=5, eval_every=5, checkpoint_every=50, segment_length=16)
    _, result = low_rank_finetune(tiny_student(), rows, rows, params, scratch=tmp_path / "a")
    assert result.best_loss < 0.97 * result.history[0]["validation_loss"]
    with pytest.raises(UserError, match=r"segment_length. must be null with `compute\.gradient_checkpointing"):
        low_rank_finetune(tiny_student(), rows, rows, params, scratch=tmp_path / "b", gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"must be null with `data\.packing: documents`, got 16"):
        segmented_loss(tiny_student(), FakeRows(2, documents=True).batch(range(2)), 16, None)


def test_offloaded_activations_give_the_same_weights(tmp_path: Path) -> None:
    rows, found = FakeRows(8), []
    params = FinetuneParams(lr=1e-2, batch_size=4, epochs=2, eval_every=5, checkpoint_every=50, lora_rank=2)
    for offload in (False, True):
        model, _ = low_rank_finetune(
            tiny_student(),
            rows,
            rows,
            params,
            scratch=tmp_path / str(offload),
            gradient_checkpointing=True,
            offload_activations=offload,
        )
        found.append({name: p for name, p in model.named_parameters() if "lora_" in name})
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_what_is_offloaded_is_not_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = add_lora(tiny_student(), FinetuneParams(lora_rank=2), seed=0)
    moved: list[torch.Tensor] = []

    def watched(tensor: torch.Tensor, real: Any = segments._to_host) -> torch.Tensor:
        moved.append(tensor)
        return real(tensor)

    monkeypatch.setattr(segments, "_to_host", watched)
    rows = FakeRows(2)
    with segments.offloaded():
        loss = next_token_loss(model, rows.batch([0, 1]))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not [x.shape for x in moved if x.untyped_storage().data_ptr() in weights]
    assert sum(x.numel() for x in moved) > 1000
    loss.backward()
    kept = gradients(model)
    next_token_loss(model, rows.batch([0, 1])).backward()
    assert kept
    assert all(torch.equal(value, kept[name]) for name, value in gradients(model).items())

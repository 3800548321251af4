"""The default recipe from the library's public names alone: attention transfer, selection, low-rank finetuning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lolcats_core as lc
from tests.core.tiny import FakeRows, tiny_teacher


def test_every_public_name_exists() -> None:
    assert sorted(lc.__all__) == lc.__all__
    assert all(hasattr(lc, name) for name in lc.__all__)


@pytest.mark.parametrize("criterion", ["transfer_error", "greedy_kl"])
def test_the_default_recipe_needs_public_names_alone(tmp_path: Path, criterion: Any) -> None:
    teacher, train, validation = tiny_teacher(), FakeRows(), FakeRows(4, seed=1)
    student = lc.linearize(teacher, lc.LinearizeConfig(window_size=8, feature_dim=8))
    transfer = lc.TransferParams(max_steps=2, batch_size=4)
    result = lc.attention_transfer(student, train, validation, transfer, scratch=tmp_path / "1")
    params = lc.SelectParams(softmax_budget={"layers": 1}, criterion=criterion, rows=2)
    selected, selection = lc.select(teacher, student, validation, params)
    (layer,) = selection.settings.softmax_layers
    assert selected.config.linearize == selection.settings.to_dict()
    # What stays linear has the trained maps, and the student before selection is as it was.
    trained, kept = student.state_dict(), selected.state_dict()
    maps = [name for name in kept if "feature_maps" in name]
    assert maps
    assert all(torch.equal(kept[name], trained[name]) for name in maps)
    assert not any(f"layers.{layer}." in name for name in maps)
    assert student.config.linearize["softmax_layers"] == []
    finetune = lc.FinetuneParams(max_steps=2, batch_size=4, lora_rank=2)
    adapted, tuned = lc.low_rank_finetune(selected, train, validation, finetune, scratch=tmp_path / "2")
    assert (result.steps, tuned.steps) == (2, 2)
    logits = adapted.merge_and_unload()(validation.batch([0])["input_ids"]).logits
    assert math.isfinite(float(logits.sum()))

"""A model run layer by layer gives the logits and the perplexity of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lolcats_common.errors import UserError
from lolcats_core.evaluation.streamed_perplexity import streamed_logits, streamed_perplexity
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.map_files import save_feature_maps
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.training.perplexity import perplexity
from tests.core.tiny import MIXED, SETTINGS, FakeRows, tiny_student, tiny_teacher

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def layerwise(folder: Path, **options: object) -> LayerwiseModel:
    return LayerwiseModel.open(folder, AutoConfig.from_pretrained(folder), **CPU, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_teacher_has_the_same_logits_and_perplexity(tmp_path: Path, family: str) -> None:
    model = tiny_teacher(family, tie_word_embeddings=family in ("llama", "gemma2"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    rows = FakeRows(6)
    parts = [logits for _, logits in streamed_logits(layerwise(tmp_path), rows, batch_size=4)]
    with torch.no_grad():
        expected = model(rows.input_ids).logits
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)
    streamed = streamed_perplexity(layerwise(tmp_path), rows, batch_size=4)
    whole = perplexity(model, rows, batch_size=4)
    assert (streamed.loss, streamed.tokens) == (pytest.approx(whole.loss, rel=1e-6), whole.tokens)


@pytest.mark.parametrize("documents", [False, True])
def test_a_students_perplexity_is_the_same_saved_whole_or_as_maps_beside_its_teacher(
    tmp_path: Path, documents: bool
) -> None:
    student = tiny_student("qwen3")
    tiny_teacher("qwen3").save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    save_feature_maps(student, tmp_path / "maps.safetensors")
    rows = FakeRows(5, documents=documents)
    expected = perplexity(student, rows, batch_size=2, max_rows=4).loss
    beside = layerwise(tmp_path / "teacher", settings=MIXED, maps=tmp_path / "maps.safetensors")
    for found in (layerwise(tmp_path / "student"), beside):
        result = streamed_perplexity(found, rows, batch_size=2, max_rows=4, folder=tmp_path / "buffer")
        assert result.loss == pytest.approx(expected, rel=1e-6)
    assert list((tmp_path / "buffer").iterdir()) == []


def test_maps_made_with_other_settings_are_refused(tmp_path: Path) -> None:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    save_feature_maps(tiny_student(), tmp_path / "maps.safetensors")
    with pytest.raises(UserError, match="made with `softmax_layers`"):
        layerwise(tmp_path / "teacher", settings=SETTINGS, maps=tmp_path / "maps.safetensors")


def test_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    tiny_teacher().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no token to predict"):
        streamed_perplexity(layerwise(tmp_path), FakeRows(0), batch_size=4)

"""A linearized model of any family gives each token one output, however its sequence is cut, padded or packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_core import LinearizeConfig
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.modeling import linearize
from lolcats_core.model.transformers_versions import CACHE
from tests.core.tiny import BOUNDED, MIXED, MIXTURE, RINGS, decode, padded, tiny_student, tiny_teacher, tokens

WINDOWS = ("terraced", "sliding", "none")
STUDENTS = {"mixed": MIXED, "bounded": BOUNDED, "rings": RINGS, "mixture": MIXTURE}
families = pytest.mark.parametrize("family", sorted(FAMILIES))
settings = pytest.mark.parametrize("settings", STUDENTS.values(), ids=STUDENTS.keys())


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


@families
@settings
@pytest.mark.parametrize("filler", [0, 1, -1])
@torch.no_grad()
def test_packed_documents_in_padded_rows_equal_separate_documents(
    family: str, settings: LinearizeConfig, filler: int
) -> None:
    """Two rows of documents with padding before, behind and between them; `filler` stands for positions at padding."""
    model = tiny_student(family, settings)
    documents = {n: tokens(1, n, seed=n)[0] for n in (25, 1, 15, 30, 9)}
    pad = torch.zeros(4, dtype=torch.long)
    rows = [[pad, documents[25], documents[1], documents[15]], [documents[30], pad, documents[9]]]
    rows[1].append(torch.zeros(2, dtype=torch.long))
    ids = torch.stack([torch.cat(row) for row in rows])
    mask = ids != 0
    places = [[torch.arange(25), torch.arange(1), torch.arange(15)], [torch.arange(30), torch.arange(9)]]
    positions = torch.full_like(ids, filler)
    for row, parts in enumerate(places):
        positions[row, mask[row]] = torch.cat(parts)
    if filler == -1:  # what counting on over padding gives
        positions = torch.where(mask, positions, torch.arange(ids.shape[1]))
    packed = model(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    for row, lengths in enumerate(((25, 1, 15), (30, 9))):
        alone = [model(documents[n][None], use_cache=False).logits[0] for n in lengths]
        close(packed[row][mask[row]], torch.cat(alone))


@torch.no_grad()
def test_left_padding_with_positions_is_no_second_document() -> None:
    model, ids = tiny_student(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert out[CACHE] is not None
    close(out.logits[0, 7:], model(ids[:1, 7:], use_cache=False).logits[0])


@torch.no_grad()
def test_packed_rows_and_a_cache_are_refused_together() -> None:
    model, ids = tiny_student(), tokens(1, 30)
    positions = torch.cat([torch.arange(10), torch.arange(20)])[None]
    assert model(ids, position_ids=positions, use_cache=True).get(CACHE) is None
    with pytest.raises(UserError, match="must be None with packed rows"):
        model(ids, position_ids=positions, **{CACHE: HybridCache(model.config)})


@families
@settings
@torch.no_grad()
def test_prefill_at_any_split_and_steps_give_the_full_pass(family: str, settings: LinearizeConfig) -> None:
    model, ids = tiny_student(family, settings, dtype=torch.float64), tokens(2, 41)
    full = model(ids, use_cache=False).logits
    for split in (1, 7, 8, 9, 15, 16, 17, 23, 24, 40):
        close(decode(model, ids, split), full)


@families
@settings
@torch.no_grad()
def test_float32_gives_what_float64_gives(family: str, settings: LinearizeConfig) -> None:
    ids, wide = tokens(2, 41), tiny_student(family, settings, dtype=torch.float64)
    close(tiny_student(family, settings)(ids).logits, wide(ids, use_cache=False).logits)


@families
@settings
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_single_rows(family: str, settings: LinearizeConfig, side: str) -> None:
    model, rows = tiny_student(family, settings), [tokens(1, n, seed=n) for n in (41, 30, 9, 1)]
    ids, mask = padded(rows, side)
    batched = model(ids, attention_mask=mask, use_cache=False).logits
    for i, row in enumerate(rows):
        close(batched[i][mask[i].bool()], model(row, use_cache=False).logits[0])


@families
@settings
@torch.no_grad()
def test_left_padded_steps_equal_single_rows(family: str, settings: LinearizeConfig) -> None:
    model, rows = tiny_student(family, settings), [tokens(1, n, seed=n) for n in (41, 30, 12)]
    ids, mask = padded(rows, "left")
    cache, parts = None, []
    for start, stop in ((0, 35), *((t, t + 1) for t in range(35, 41))):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    batched = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        close(batched[i][mask[i].bool()], model(row, use_cache=False).logits[0])


@families
@settings
@torch.no_grad()
def test_packed_documents_equal_separate_documents(family: str, settings: LinearizeConfig) -> None:
    model, documents = tiny_student(family, settings), [tokens(2, n, seed=n) for n in (25, 1, 15)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents]).expand(2, -1)
    packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(ids, use_cache=False).logits for ids in documents], 1))


@families
@settings
@torch.no_grad()
def test_outputs_depend_neither_on_later_tokens_nor_on_their_number(family: str, settings: LinearizeConfig) -> None:
    model, ids, other = tiny_student(family, settings), tokens(2, 41), tokens(2, 41, seed=1)
    full = model(ids, use_cache=False).logits
    for stop in (1, 8, 9, 16, 17, 40):
        close(model(ids[:, :stop], use_cache=False).logits, full[:, :stop])
        changed = torch.cat([ids[:, :stop], other[:, stop:]], 1)
        close(model(changed, use_cache=False).logits[:, :stop], full[:, :stop])


@families
@pytest.mark.parametrize(("window", "covered"), [("terraced", 16), ("sliding", 8)])
@torch.no_grad()
def test_inside_the_window_the_student_is_its_teacher_whatever_its_maps(family: str, window: str, covered: int) -> None:
    student = tiny_student(family, LinearizeConfig(window=window, window_size=8, feature_dim=8))
    teacher, ids = tiny_teacher(family), tokens(2, covered + 1)
    expected, actual = (model(ids, use_cache=False).logits for model in (teacher, student))
    close(actual[:, :covered], expected[:, :covered])
    assert not torch.allclose(actual[:, covered], expected[:, covered], atol=1e-3)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize("decay", [None, 0.9])
@torch.no_grad()
def test_every_window_and_kind_of_key_map_decodes_exactly(window: str, per: str, decay: float | None) -> None:
    settings = replace(MIXED, window=window, k_map_per=per, softmax_heads={2: (0,)}, linear_decay=decay)
    model, rows = tiny_student(settings=settings), [tokens(1, n, seed=n) for n in (41, 20)]
    full = model(rows[0], use_cache=False).logits
    close(decode(model, rows[0], 19), full)
    ids, mask = padded(rows, "left")
    close(model(ids, attention_mask=mask, use_cache=False).logits[0], full[0])


@torch.no_grad()
def test_softmax_attention_by_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids = tiny_teacher("gemma2"), tokens(2, 41)
    model = linearize(teacher, MIXED)
    positions = torch.cat([torch.arange(25), torch.arange(16)]).expand(2, -1)
    whole = [model(ids, use_cache=False).logits, model(ids, position_ids=positions, use_cache=False).logits]
    monkeypatch.setattr("lolcats_core.model.softmax_attention.SOFTMAX_BLOCK", 7)
    close(model(ids, use_cache=False).logits, whole[0])
    close(model(ids, position_ids=positions, use_cache=False).logits, whole[1])

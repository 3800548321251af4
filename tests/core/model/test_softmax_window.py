"""`softmax_window` and `softmax_sinks`: kept softmax attention that sees a bounded set of tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams, ParamsError, TransferParams, params_from_dict
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.state_size import published_settings, state_size
from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.sinks import ABSENT, gather_sinks
from lolcats_core.model.softmax_attention import SoftmaxWindow, kept_attention
from lolcats_core.training.attention_transfer import transfer_losses
from lolcats_core.training.low_rank_finetune import add_lora
from lolcats_core.training.segments import segmented_loss
from tests.core.tiny import BOUNDED, MIXED, FakeRows, decode, padded, tiny_student, tiny_teacher, tokens


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """[B, T, H, D] by T x T weights."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    seen = (key <= query) & ((key > query - window) | (key < sinks))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def operands(length: int = 53) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize(("window", "sinks"), [(2, 0), (2, 1), (9, 0), (9, 4), (52, 51), (53, 4), (60, 4)])
def test_values_and_gradients_are_the_definition_s(
    window: int, sinks: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lolcats_core.model.softmax_attention.SOFTMAX_BLOCK", block)
    given = [x.requires_grad_() for x in operands()]
    expected = naive(*given, window, sinks)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    actual = kept_attention(*given, HybridContext(), Scores(8**-0.5), SoftmaxWindow(window, sinks))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad((actual * weight).sum(), given), wanted)


def test_sinks_are_the_first_real_tokens_however_they_arrive() -> None:
    _, k, v = operands(9)
    real = torch.tensor([[False] * 5 + [True] * 4, [False, True, False, True, True, False, True, True, True]])
    whole = gather_sinks(None, k, v, 3, 0, real)
    assert whole.column.tolist() == [[5, 6, 7], [1, 3, 4]]
    for row in range(2):
        assert torch.equal(whole.k[row], k[row][:, whole.column[row]])
        assert torch.equal(whole.v[row], v[row][:, whole.column[row]])
    parts = None
    for start, stop in ((0, 2), (2, 3), (3, 7), (7, 9)):
        parts = gather_sinks(parts, k[:, :, start:stop], v[:, :, start:stop], 3, start, real[:, :stop])
        if stop == 3:
            assert parts.column.tolist() == [[ABSENT] * 3, [1, ABSENT, ABSENT]]
    assert parts is not None
    for a, b in zip(vars(parts).values(), vars(whole).values(), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_row_whose_sinks_come_after_its_window_slid_decodes_exactly() -> None:
    """Padding longer than the window stands before the row's first token."""
    model, rows = tiny_student(settings=BOUNDED), [tokens(1, 41, seed=1), tokens(1, 16, seed=2)]
    ids, mask = padded(rows, "left")
    cache, parts = None, []
    for start in range(0, 41, 2):
        part = slice(start, start + 2)
        out = model(ids[:, part], attention_mask=mask[:, : start + 2], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    batched = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            batched[i][mask[i].bool()], model(row, use_cache=False).logits[0], rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_the_whole_state_stays_constant_and_is_what_the_settings_say() -> None:
    for settings in (
        BOUNDED,
        dataclasses.replace(BOUNDED, softmax_sinks=0, k_map_per="kv_head", feature_map="t2r"),
        dataclasses.replace(BOUNDED, softmax_layers=(0, 1), softmax_heads={}, window="sliding"),
        MIXED,
    ):
        for family, changes in (("llama", {}), ("gemma2", {}), ("mistral", {"sliding_window": 16})):
            model, cache = tiny_student(family, settings, **changes), None
            size = state_size(model.config, settings, torch.float32)
            for length in (40, 60):
                cache = HybridCache(model.config)
                model(tokens(1, length), past_key_values=cache)
                assert cache.state_bytes() + cache.softmax_bytes() == size.at(length)
            assert (size.per_token == 0) == (settings.softmax_window is not None or family == "mistral")


def test_the_published_state_of_a_known_shape() -> None:
    """12 layers, 6 query and 2 kv heads of 128: 393 kB of S, 3 kB of z and a ring of 128 tokens in each layer."""
    config = tiny_teacher(
        num_attention_heads=6, num_key_value_heads=2, head_dim=128, num_hidden_layers=12, hidden_size=48
    ).config
    size = state_size(config, published_settings(config), torch.bfloat16)
    layer = 6 * 128 * 128 * 4 + 6 * 128 * 4 + 128 * 2 * 2 * 128 * 2 + 8
    assert (size.linear, size.exact, size.per_token) == (12 * layer, 0, 0)


@torch.no_grad()
def test_a_window_that_covers_the_text_changes_nothing() -> None:
    wide = dataclasses.replace(BOUNDED, softmax_window=64)
    ids = tokens(2, 50)
    expected = tiny_student(settings=MIXED)(ids, use_cache=False).logits
    assert torch.equal(tiny_student(settings=wide)(ids, use_cache=False).logits, expected)
    assert not torch.allclose(tiny_student(settings=BOUNDED)(ids, use_cache=False).logits, expected, atol=1e-3)


@torch.no_grad()
def test_rows_of_the_cache_can_be_chosen_repeated_and_forgotten() -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(3, 50)
    expected = model(ids, use_cache=False).logits[:, 40:]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(ids[:, :40], use_cache=True).past_key_values
        change(cache)
        rest = model(ids[torch.tensor(rows), 40:], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[rows], rtol=1e-5, atol=1e-5)
    cache.reset()
    assert (cache.get_seq_length(), cache.state_bytes(), cache.softmax_bytes()) == (0, 0, 0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[:, 40:], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_with_beams_equals_generation_without_a_cache() -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(2, 20)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_segments_give_the_loss_of_whole_rows_and_reach_the_projections() -> None:
    model, batch = tiny_student(settings=BOUNDED), FakeRows(2).batch(range(2))
    adapted = add_lora(model, FinetuneParams(lora_rank=2), seed=0)
    whole = segmented_loss(adapted, batch, 40, None)
    torch.testing.assert_close(segmented_loss(adapted, batch, 9, 1.0), whole, rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_B" in n)


@torch.no_grad()
def test_the_bound_survives_saving(tmp_path: Path) -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(2, 40)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["linearize"]
    assert (stored["softmax_window"], stored["softmax_sinks"]) == (10, 3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(decode(loaded, ids, 20), model(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_transfer_is_shown_the_teacher_whatever_the_window() -> None:
    """The layers behind a bounded one get what the teacher puts out."""
    batch = FakeRows(2).batch(range(2))
    settings = dataclasses.replace(BOUNDED, softmax_layers=(0,), softmax_window=4, softmax_sinks=0)
    unbounded = dataclasses.replace(settings, softmax_window=None)
    errors = [transfer_losses(tiny_student(settings=each), batch, TransferParams()) for each in (settings, unbounded)]
    assert errors[0] == errors[1]


def test_maps_fit_whatever_the_window_of_the_kept_heads(tmp_path: Path) -> None:
    lc.save_feature_maps(tiny_student(settings=MIXED), tmp_path / "maps")
    model = lc.linearize(tiny_teacher(), BOUNDED)
    lc.load_feature_maps(model, tmp_path / "maps")
    assert torch.equal(model(tokens(2, 40)).logits, tiny_student(settings=BOUNDED)(tokens(2, 40)).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softmax_window": 1}, r"`softmax_window` must be null or at least 2, got 1"),
        ({"softmax_sinks": 2}, r"`softmax_sinks` must be at least 0 and below `softmax_window` \(None\), got 2"),
        ({"softmax_window": 8, "softmax_sinks": 8}, r"below `softmax_window` \(8\), got 8"),
        ({"softmax_window": 8, "softmax_sinks": -1}, r"must be at least 0 and .* got -1"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"linearize": settings})


def test_a_window_as_wide_as_the_teacher_s_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"below the teacher's own sliding window of 12, got 12"):
        lc.linearize(tiny_teacher("mistral", sliding_window=12), dataclasses.replace(MIXED, softmax_window=12))

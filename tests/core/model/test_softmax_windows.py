"""`softmax_windows`: kept kv groups with windows of their own beside groups that see everything or are linearized."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import ParamsError, params_from_dict
from lolcats_core.model.attention import hybrid_attention_forward
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.state_size import state_size, teacher_size
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.modeling import attention_layers
from tests.core.tiny import MIXED, MIXTURE, RINGS, decode, tiny_student, tiny_teacher, tokens

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}
# No layer is linearized: rings alone, two of them of one size.
LADDER = dataclasses.replace(
    RINGS,
    softmax_layers=(0, 1, 2),
    softmax_heads={},
    softmax_windows={0: {0: 10}, 1: {0: 4, 1: 4}, 2: {0: 17, 1: 5}},
)


def dense(q: Tensor, k: Tensor, v: Tensor, sizes: list[int | None], sinks: int, real: Tensor) -> Tensor:
    """[B, T, H, D] of float64 by T x T weights; kv head h sees the `sizes[h]` newest tokens and the first real ones."""
    batch, _, length, dim = q.shape
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    first = (real.cumsum(1) <= sinks)[:, None, :]
    per = q.shape[1] // len(sizes)
    out = torch.empty(batch, length, q.shape[1], dim, dtype=q.dtype)
    for head in range(q.shape[1]):
        size = sizes[head // per]
        near = torch.ones_like(key <= query) if size is None else key > query - size
        seen = (key <= query) & (near | first) & real[:, None, :] | (key == query)
        scores = (q[:, head] @ k[:, head // per].mT * dim**-0.5).masked_fill(~seen, float("-inf"))
        out[:, :, head] = scores.softmax(-1) @ v[:, head // per]
    return out


def drawn(seed: int) -> tuple[Any, list[int | None], int, list[int]]:
    """A student of one draw, the sizes of layer 0's kv heads, the number of sinks, and its heads that keep softmax."""
    draw = random.Random(seed)
    sinks = draw.randrange(4)
    kept = sorted(draw.sample(range(4), draw.randint(1, 4)))
    sizes: list[int | None] = [draw.choice([None, *range(max(2, sinks + 1), 20)]) for _ in range(4)]
    windows = {0: {head: size for head in kept if (size := sizes[head]) is not None}}
    chosen: dict[str, Any] = {"softmax_layers": (0,)} if len(kept) == 4 else {"softmax_heads": {0: tuple(kept)}}
    sinks = sinks if windows[0] else 0
    settings = lc.LinearizeConfig(window_size=8, feature_dim=8, softmax_windows=windows, softmax_sinks=sinks, **chosen)
    return tiny_student(settings=settings, dtype=torch.float64, **FOUR), sizes, sinks, kept


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_every_group_sees_its_own_window_whole_cut_padded_and_packed(seed: int) -> None:
    model, sizes, sinks, kept = drawn(seed)
    module = attention_layers(model)[0]
    generator = torch.Generator().manual_seed(seed)
    length = 41
    q, k, v = (torch.randn(2, h, length, 8, dtype=torch.float64, generator=generator) for h in (8, 4, 4))
    heads = [h for group in kept for h in (2 * group, 2 * group + 1)]

    def run(context: HybridContext, place: slice = slice(None)) -> Tensor:
        parts = [x[:, :, place] for x in (q, k, v)]
        if context.cache is not None:
            context.past_length = context.cache.get_seq_length(0)
            keys, values = context.cache.update(parts[1], parts[2], 0)
            parts = [parts[0], keys, values]
        return hybrid_attention_forward(module, *parts, None, hybrid=context)[0]

    for padding in (0, 19):
        real = torch.ones(2, length, dtype=torch.bool)
        real[1, :padding] = False
        expected = dense(q, k, v, sizes, sinks, real)
        mask = real if padding else None
        cuts = [0, *sorted(random.Random(seed).sample(range(1, length), 6)), length]
        cache = HybridCache(model.config)
        pieces = [
            run(HybridContext(cache, None if mask is None else mask[:, :stop]), slice(start, stop))
            for start, stop in itertools.pairwise(cuts)
        ]
        for y in (run(HybridContext(padding_mask=mask)), torch.cat(pieces, 1)):
            torch.testing.assert_close(y[real][:, heads], expected[real][:, heads])
    documents = (torch.arange(length) >= 17).long().expand(2, -1)
    packed = run(HybridContext(document_ids=documents))
    for place in (slice(0, 17), slice(17, length)):
        part = [x[:, :, place] for x in (q, k, v)]
        alone = dense(*part, sizes, sinks, torch.ones(2, part[0].shape[2], dtype=torch.bool))
        torch.testing.assert_close(packed[:, place][:, :, heads], alone[:, :, heads])


@torch.no_grad()
def test_rings_stand_beside_groups_of_the_mixture_with_first_tokens_of_their_own() -> None:
    settings = dataclasses.replace(
        MIXTURE, softmax_layers=(0,), softmax_windows={0: {0: 10}, 2: {1: 17}}, softmax_sinks=2
    )
    model, ids = tiny_student(settings=settings), tokens(2, 41)
    expected = model(ids, use_cache=False).logits
    for split in (1, 9, 17, 30):
        torch.testing.assert_close(decode(model, ids, split), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_equal_windows_are_softmax_window() -> None:
    same = dataclasses.replace(MIXED, softmax_windows={1: {0: 10, 1: 10}, 2: {1: 10}}, softmax_sinks=3)
    whole = dataclasses.replace(MIXED, softmax_window=10, softmax_sinks=3)
    ids = tokens(2, 50)
    assert torch.equal(tiny_student(settings=same)(ids).logits, tiny_student(settings=whole)(ids).logits)
    # An entry goes before `softmax_window`.
    other = dataclasses.replace(whole, softmax_windows={1: {0: 20}})
    assert other.softmax_parts(1, 2) == {20: (0,), 10: (1,)}
    assert not torch.allclose(tiny_student(settings=other)(ids).logits, tiny_student(settings=whole)(ids).logits)


@torch.no_grad()
def test_the_bytes_of_the_cache_are_what_the_settings_say_at_every_length() -> None:
    for family, changes in (("llama", {}), ("gemma2", {}), ("mistral", {"sliding_window": 30})):
        for settings in (RINGS, LADDER if family != "gemma2" else RINGS):
            model = tiny_student(family, settings, **changes)
            size = state_size(model.config, settings, torch.float32)
            for length in (3, 9, 16, 40, 60):
                cache = HybridCache(model.config)
                model(tokens(1, length), past_key_values=cache)
                assert cache.state_bytes() + cache.softmax_bytes() == size.at(length)
    config = tiny_teacher().config
    ring, token = state_size(config, LADDER, torch.bfloat16), 2 * 8 * 2
    # Rings of 10, 4, 4, 17 and 5 tokens and a group that sees all; three sinks in each, their columns once a part.
    assert ring.exact == token * (9 + 3 + 3 + 16 + 4 + 5 * 3) + 4 * 3 * 8
    assert (ring.linear, ring.per_token) == (0, token)
    assert teacher_size(config, torch.bfloat16).at(100) == 100 * 6 * token


@torch.no_grad()
def test_a_model_of_rings_alone_decodes_pads_and_survives_saving(tmp_path: Path) -> None:
    model, ids = tiny_student(settings=LADDER), tokens(2, 40)
    expected = model(ids, use_cache=False).logits
    for split in (1, 3, 10, 30):
        torch.testing.assert_close(decode(model, ids, split), expected, rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    for settings in (LADDER, RINGS):
        student = tiny_student(settings=settings)
        student.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["linearize"]
        assert stored["softmax_windows"]["2"] == {str(h): n for h, n in settings.softmax_windows[2].items()}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert lc.LinearizeConfig.from_dict(loaded.config.linearize) == settings
        assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("settings", [LADDER, RINGS, dataclasses.replace(LADDER, softmax_window=9, softmax_windows={})])
@torch.no_grad()
def test_tokens_are_not_taken_back(settings: lc.LinearizeConfig) -> None:
    """A window has dropped what would come into sight again, and first tokens stay."""
    cache = tiny_student(settings=settings)(tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(UserError, match="cannot forget tokens"):
        cache.crop(-3)


def test_settings_of_earlier_versions_load_and_maps_fit_whatever_the_windows(tmp_path: Path) -> None:
    old = {name: value for name, value in MIXED.to_dict().items() if name != "softmax_windows"}
    assert lc.LinearizeConfig.from_dict(old) == MIXED
    lc.save_feature_maps(tiny_student(settings=MIXED), tmp_path / "maps")
    model = lc.linearize(tiny_teacher(), dataclasses.replace(MIXED, softmax_windows={2: {1: 17}}))
    lc.load_feature_maps(model, tmp_path / "maps")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softmax_windows": {1: {0: 9}}}, r"of layer 1, kv head 0, must be of a group in `softmax_layers` or"),
        ({"softmax_heads": {1: [0]}, "softmax_windows": {1: {1: 9}}}, r"layer 1, kv head 1, must be of a group in"),
        ({"softmax_layers": [1], "softmax_windows": {1: {0: 1}}}, r"layer 1, kv head 0, must be at least 2, got 1"),
        ({"softmax_layers": [1], "softmax_windows": {1: {"a": 9}}}, r"must have kv heads as keys, each once, got 'a'"),
        ({"softmax_layers": [1], "softmax_windows": {1: {0: 9, "0": 8}}}, r"each once, got 0, '0'"),
        ({"softmax_layers": [1], "softmax_windows": {-1: {0: 9}}}, r"`softmax_windows` must have layer indices of at"),
        ({"softmax_layers": [1], "softmax_windows": {1: 9}}, r"`linearize.softmax_windows.1` must be a mapping, got 9"),
        (
            {"softmax_layers": [1], "softmax_windows": {1: {0: 9, 1: 4}}, "softmax_sinks": 4},
            r"`softmax_sinks` must be at least 0 and below all `softmax_windows` \(4\), got 4",
        ),
    ],
)
def test_windows_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"linearize": settings})


@pytest.mark.parametrize(
    ("family", "layer", "windows", "message"),
    [
        ("llama", 7, {0: 9}, r"`softmax_layers` must be below the 3 layers, got 7"),
        ("llama", 0, {2: 9}, r"`softmax_windows` of layer 0 must be below its 2 kv heads, got 2"),
        ("gemma2", 1, {0: 9}, r"layer 1 in `softmax_windows` is a local layer, which has a window of its own"),
        ("mistral", 0, {1: 12}, r"`softmax_windows` of layer 0 must be below the teacher's own sliding window of 12"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(
    family: str, layer: int, windows: dict[int, int], message: str
) -> None:
    settings = lc.LinearizeConfig(softmax_layers=(layer,), softmax_windows={layer: windows})
    changes = {"sliding_window": 12} if family == "mistral" else {}
    with pytest.raises(UserError, match=message):
        lc.linearize(tiny_teacher(family, **changes), settings)

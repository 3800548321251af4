"""A step of a batch gives every sequence what it would get alone, from pages that others used before."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats_common.linearize_config import LinearizeConfig, kv_heads
from lolcats_core.model.attention import hybrid_attention_forward
from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.modeling import attention_layers
from lolcats_vllm.state import StateLayout, head_dim, heads_at_once, page_shapes, part_operands, plans
from lolcats_vllm.steps import Batch, run_step
from tests.core.tiny import BOUNDED, MIXED, MIXTURE, RINGS, SETTINGS, tiny_student

KINDS = {
    "published": SETTINGS,
    "kept layers and heads": MIXED,
    "bounded": BOUNDED,
    "mixture": MIXTURE,
    "rings": RINGS,
    "sliding": LinearizeConfig(window="sliding", window_size=8, feature_dim=8, window_sinks=2),
    "no window": LinearizeConfig(window="none", feature_dim=8),
}


def pages(config: Any, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pages that hold what no computation may read."""
    first, second = page_shapes(config, dtype)
    return torch.full((count, *first), torch.nan), torch.full((count, *second), torch.nan, dtype=dtype)


def in_steps(layer: Any, plan: Any, sequences: list[tuple[Tensor, ...]], chunks: list[list[int]]) -> list[list[Tensor]]:
    """Each part's outputs of every sequence, which advances by its next chunk in every step."""
    config = layer.config
    layout, cache = StateLayout(config, plan.parts, torch.float32), pages(config, len(sequences) + 2)
    scores = Scores(layer.scaling)
    operands = [part_operands(config, part, getattr(layer, "feature_maps", None), scores, "cpu") for part in plan.parts]
    seen, slots = [0] * len(sequences), list(range(1, len(sequences) + 1))[::-1]
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(max(map(len, chunks))):
        # Those with one new token come first.
        active = sorted((n for n, each in enumerate(chunks) if step < len(each)), key=lambda n: chunks[n][step] > 1)
        new = [chunks[n][step] for n in active]
        ranges = [slice(seen[n], seen[n] + size) for n, size in zip(active, new, strict=True)]
        q, k, v = (
            torch.cat([sequences[n][i][:, span] for n, span in zip(active, ranges, strict=True)], 1) for i in range(3)
        )
        # vLLM pads steps.
        q, k, v = (torch.cat([x, torch.full_like(x[:, :2], torch.nan)], 1) for x in (q, k, v))
        for n, size in zip(active, new, strict=True):
            seen[n] += size
        singles = sum(size == 1 for size in new)
        batch = Batch(
            singles,
            len(new) - singles,
            torch.tensor([0, *new]).cumsum(0).int(),
            torch.tensor([seen[n] for n in active]).int(),
            torch.tensor([slots[n] for n in active]).int(),
        )
        found = run_step(plan, layout, operands, cache, batch, q, k, v)
        begin = 0
        for n, size in zip(active, new, strict=True):
            outputs[n].append(torch.cat([y[:, begin : begin + size] for y in found], 2))
            begin += size
        assert all((y[:, begin:] == 0).all() for y in found)
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_a_batch_get_what_they_get_alone(kind: str) -> None:
    model = tiny_student(settings=KINDS[kind])
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    lengths = [1, 9, 40, 61]
    chunks = [[1], [1] * 9, [33, *[1] * 7], []]
    while sum(chunks[3]) < lengths[3]:
        chunks[3].append(min(draw.choice([1, 2, 7, 19]), lengths[3] - sum(chunks[3])))
    for number, (layer, plan) in enumerate(zip(attention_layers(model), plans(model.config), strict=True)):
        if not plan.parts:
            assert kind in ("kept layers and heads", "mixture")
            assert number == 1
            continue
        heads, groups = model.config.num_attention_heads, kv_heads(model.config)
        sequences = [
            tuple(
                torch.randn(1, n, count, head_dim(model.config), generator=generator)
                for count in (heads, groups, groups)
            )
            for n in lengths
        ]
        outputs = in_steps(layer, plan, sequences, chunks)
        for (q, k, v), found in zip(sequences, outputs, strict=True):
            with torch.no_grad():
                whole, _ = hybrid_attention_forward(
                    layer, *(x.transpose(1, 2) for x in (q, k, v)), None, scaling=layer.scaling
                )
            expected = torch.cat([plan.groups.take(whole, part.members) for part in plan.parts], 2)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=2e-4, atol=2e-5)


def test_states_are_read_as_they_were_written() -> None:
    config = tiny_student(settings=BOUNDED).config
    plan = plans(config)[2]
    layout, cache = StateLayout(config, plan.parts, torch.bfloat16), pages(config, 4, torch.bfloat16)
    slots, length = torch.tensor([2, 0]), torch.tensor([5, 7])
    before = [template.map(lambda x: torch.rand(2, *x.shape[1:]).to(x.dtype)) for template in layout.templates]
    layout.write(cache, slots, before)
    for state, same in zip(layout.read(cache, slots, length), before, strict=True):
        for name in ("s", "z", "ring_k", "ring_v", "sink_k", "sink_v"):
            given, found = getattr(same, name), getattr(state, name)
            assert (given is None and found is None) or torch.equal(given, found), name
        assert state.length.tolist() == [5, 7]
    assert all(row[[1, 3]].isnan().all() for row in cache)


def test_sums_are_float32_and_windows_have_the_model_s_dtype() -> None:
    config = tiny_student(settings=MIXTURE).config
    for plan in plans(config):
        for state in StateLayout(config, plan.parts, torch.bfloat16).templates:
            assert {state.s.dtype, state.z.dtype} == {torch.float32}
            assert {state.ring_k.dtype, state.ring_v.dtype} == {torch.bfloat16}


def test_a_page_ends_where_the_next_one_s_float32_can_begin() -> None:
    settings = LinearizeConfig(window_size=8, feature_dim=8, window_sinks=1)
    config = tiny_student(settings=settings, num_attention_heads=1, num_key_value_heads=1, head_dim=2).config
    (first,), (second,) = page_shapes(config, torch.bfloat16)
    assert (first * 4 + second * 2) % 4 == 0


def test_a_page_has_two_rows_without_a_window_too() -> None:
    config = tiny_student(settings=KINDS["no window"]).config
    assert all(size > 0 for (size,) in page_shapes(config, torch.float32))


@pytest.mark.parametrize(
    ("kept", "at_once"), [({}, 4), ({0: (1,)}, 1), ({0: (1, 2), 1: (0, 3)}, 2), ({0: (0, 1, 2), 1: (0, 1)}, 1)]
)
def test_kept_heads_are_computed_in_numbers_that_divide_every_layer_s(kept: Any, at_once: int) -> None:
    settings = LinearizeConfig(window_size=8, feature_dim=8, softmax_heads=kept)
    assert heads_at_once(tiny_student(settings=settings, num_key_value_heads=4).config) == at_once

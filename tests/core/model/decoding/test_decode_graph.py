"""Steps replayed as a CUDA graph give what the model itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.decoding import static_kv
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.decode_graph import _Steps, graphed_decoding
from lolcats_core.model.modeling import linearize

# What a step may hold besides states: nothing, a growing layer and growing heads, both with a window and sinks, or with
# windows of their own; and such windows without any state.
KEPT = {"softmax_layers": (1,), "softmax_heads": {2: (1,)}}
RINGS = {"softmax_windows": {1: {0: 24}, 2: {1: 40}}, "softmax_sinks": 4}
ALONE = {"softmax_layers": (0, 1, 2), "softmax_windows": {0: {1: 24}, 1: {0: 24, 1: 9}, 2: {1: 40}}, "softmax_sinks": 4}
RECIPES = [{}, KEPT, {**KEPT, "softmax_window": 24, "softmax_sinks": 4}, {**KEPT, **RINGS}, ALONE]
IDS = ["linear", "growing", "bounded", "rings", "rings alone"]
SHAPE = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def student(device: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, bos_token_id=0, eos_token_id=None, pad_token_id=0))
    return linearize(teacher.to(device).eval(), LinearizeConfig(window_size=16, feature_dim=16, **settings))


def test_a_model_on_a_cpu_runs_as_it_did() -> None:
    model = student("cpu")
    plain = model.forward
    with graphed_decoding(model):
        assert model.forward == plain
        ids = torch.zeros(1, 3, dtype=torch.long)
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape == (1, 5)


@torch.no_grad()
def test_only_repeated_plain_steps_on_the_same_state_are_taken() -> None:
    model, hybrid = student("cpu"), student("cpu", softmax_layers=(1,))
    steps, ids = _Steps(model), torch.ones(2, 1, dtype=torch.long)
    cache, other = HybridCache(model.config), HybridCache(hybrid.config)
    assert not steps.take({"input_ids": ids, "past_key_values": cache})  # prefill comes first
    model(ids, past_key_values=cache)
    hybrid(ids, past_key_values=other)
    # In this order: the state's tensors are compared with those of the call before.
    call = {"input_ids": ids, "past_key_values": cache, "attention_mask": torch.ones(2, 2), "use_cache": True}
    assert not steps.take(call)
    assert steps.take(call)
    assert steps.take(call | {"position_ids": torch.ones(2, 1)})
    for change in (
        {"input_ids": torch.ones(2, 2, dtype=torch.long)},
        {"past_key_values": None},
        {"past_key_values": other},
        {"output_hidden_states": True},
        {"inputs_embeds": torch.ones(2, 1, 128)},
    ):
        assert not steps.take(call | change)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert not steps.take(call)
    assert steps.take(call)
    with torch.enable_grad():
        assert not steps.take(call)


@pytest.fixture
def _small_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms of one more block of 64 columns than they need."""
    monkeypatch.setattr(static_kv, "LEAST", 1)
    monkeypatch.setattr(static_kv, "GROWTH", 0.0)


@pytest.mark.gpu
@pytest.mark.usefixtures("_small_storage")
@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
@torch.no_grad()
def test_greedy_generation_of_a_padded_batch_is_the_same(recipe: dict[str, Any]) -> None:
    model = student("cuda", **recipe)
    ids = torch.randint(1, 97, (3, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[2, :30] = 0, 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False}
    expected = model.generate(ids, **options)
    with graphed_decoding(model):
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options), expected)
    assert "forward" not in vars(model)


@pytest.mark.gpu
@pytest.mark.usefixtures("_small_storage")
@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
@torch.no_grad()
def test_replayed_steps_have_the_logits_of_the_full_pass_and_count_tokens(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, replays, replay = student("cuda", **recipe), [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    ids = torch.randint(1, 97, (2, 150), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected, cache = model(ids, use_cache=False).logits, HybridCache(model.config)
    parts = [model(ids[:, :20], past_key_values=cache).logits]
    with graphed_decoding(model):
        parts += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 100)]
        parts.append(model(input_ids=ids[:, 100:120], past_key_values=cache).logits)
        parts += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(120, 150)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 150
    # All but the first of each row of steps, and the first in each new storage.
    assert len(replays) >= 110 - 2 * 2 - 4


@pytest.mark.gpu
@torch.no_grad()
def test_a_second_cache_has_rooms_of_its_own() -> None:
    model = student("cuda", **KEPT)
    ids = torch.randint(1, 97, (2, 60), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected = model(ids, use_cache=False).logits
    with graphed_decoding(model):
        for rows in (ids, ids.flip(0)):
            cache = HybridCache(model.config)
            parts = [model(rows[:, :20], past_key_values=cache).logits]
            parts += [model(input_ids=rows[:, t : t + 1], past_key_values=cache).logits for t in range(20, 60)]
            found = torch.cat(parts, 1)
            torch.testing.assert_close(found, expected if rows is ids else expected.flip(0), rtol=1e-4, atol=1e-4)
            del cache  # the next one's states and static storage may come to lie at its addresses


@pytest.mark.gpu
@torch.no_grad()
def test_a_compiled_model_decodes_the_same() -> None:
    model = student("cuda")
    ids = torch.randint(1, 97, (2, 90), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected, cache = model(ids, use_cache=False).logits, HybridCache(model.config)
    parts = [model(ids[:, :50], past_key_values=cache).logits]
    compiled = torch.compile(model)
    parts += [compiled(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(50, 90)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)

"""`softmax_heads`: chosen kv groups of a layer keep softmax attention, the others are linearized."""

from __future__ import annotations

import itertools
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
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.modeling import attention_layers, feature_maps, named_map_parameters
from lolcats_core.training.attention_transfer import transfer_losses
from lolcats_core.training.low_rank_finetune import add_lora, next_token_loss
from tests.core.tiny import FakeRows, decode, padded, tiny_student, tiny_teacher, tokens

BASE: dict[str, Any] = {"window_size": 8, "feature_dim": 8}
KEPT = lc.LinearizeConfig(**BASE, softmax_heads={0: (2,), 2: (0, 3)})
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}


def student(settings: lc.LinearizeConfig = KEPT, **changes: Any) -> Any:
    return tiny_student(settings=settings, **(FOUR | changes))


def head_outputs(model: Any, ids: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """[B, T, H, D] that goes into a layer's output projection."""
    seen: list[torch.Tensor] = []
    handle = attention_layers(model)[layer].o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0].unflatten(-1, (8, 8))


def test_a_division_is_undone_by_join() -> None:
    x = torch.randn(2, 3, 8, 5)
    for kept in itertools.chain(itertools.combinations(range(4), 1), itertools.combinations(range(4), 3)):
        groups = KVGroups(4, kept)
        assert sorted((*groups.linear, *groups.softmax)) == [0, 1, 2, 3]
        taken = groups.take(x, kept)
        assert taken.shape == (2, 3, 2 * len(kept), 5)
        assert torch.equal(taken[:, :, :2], x[:, :, 2 * kept[0] : 2 * kept[0] + 2])
        assert torch.equal(groups.join((groups.linear, groups.take_linear(x)), (kept, taken)), x)


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@torch.no_grad()
def test_kept_groups_are_the_teacher_s_and_the_others_the_linearized_model_s(per: str) -> None:
    settings = lc.LinearizeConfig(**BASE, k_map_per=per, feature_map_bias=True, linear_factor="affine")
    whole = student(settings)
    kept = lc.LinearizeConfig(**settings.to_dict() | {"softmax_heads": {0: (1, 2)}})
    mixed, ids = lc.linearize(tiny_teacher(**FOUR), kept), tokens(2, 41)
    linear = torch.tensor([0, 1, 6, 7])
    for name, parameter in feature_maps(mixed)["model.layers.0.self_attn.feature_maps"].named_parameters():
        source = feature_maps(whole)["model.layers.0.self_attn.feature_maps"].get_parameter(name)
        parameter.copy_(source[linear] if len(source) == 8 else source[[0, 3]])
    y = head_outputs(mixed, ids)
    torch.testing.assert_close(y[:, :, 2:6], head_outputs(tiny_teacher(**FOUR), ids)[:, :, 2:6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[:, :, linear], head_outputs(whole, ids)[:, :, linear], rtol=1e-5, atol=1e-5)


def test_only_linearized_groups_have_maps() -> None:
    for per, ratio in (("query_head", 2), ("kv_head", 1)):
        settings = lc.LinearizeConfig(**KEPT.to_dict() | {"k_map_per": per, "feature_map_bias": True})
        shapes = {name: tuple(p.shape) for name, p in named_map_parameters(student(settings)).items()}
        for layer, linear in ((0, 3), (1, 4), (2, 2)):
            prefix = f"model.layers.{layer}.self_attn.feature_maps."
            assert shapes[f"{prefix}w_q"] == (2 * linear, 8, 8)
            assert shapes[f"{prefix}w_k"] == (ratio * linear, 8, 8)
            assert shapes[f"{prefix}b_k"] == (ratio * linear, 8)
            assert shapes[f"{prefix}window_factor"] == (2 * linear,)


@torch.no_grad()
def test_the_cache_holds_a_constant_state_and_keys_of_the_kept_groups_alone() -> None:
    model, ids = student(), tokens(2, 60)
    cache = HybridCache(model.config)
    model(ids[:, :40], past_key_values=cache)
    constant = cache.state_bytes()
    per_token = 2 * 3 * 2 * 8 * 4  # rows, kept groups of the model, k and v, head dim, bytes
    assert cache.softmax_bytes() == 40 * per_token
    model(ids[:, 40:], past_key_values=cache)
    assert (cache.state_bytes(), cache.softmax_bytes()) == (constant, 60 * per_token)
    whole = student(lc.LinearizeConfig(**BASE))(ids, use_cache=True).past_key_values
    positions = 3 * 2 * 8  # layers, rows, bytes: the states' `length`
    assert (constant - positions) * 12 == (whole.state_bytes() - positions) * 9


@torch.no_grad()
def test_rows_of_the_cache_can_be_chosen_repeated_and_forgotten() -> None:
    model, ids = student(), tokens(3, 50)
    expected = model(ids, use_cache=False).logits[:, 40:]

    def rest(cache: HybridCache, rows: torch.Tensor) -> torch.Tensor:
        return model(ids[rows, 40:], past_key_values=cache).logits

    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(ids[:, :40], use_cache=True).past_key_values
        change(cache)
        torch.testing.assert_close(rest(cache, torch.tensor(rows)), expected[rows], rtol=1e-5, atol=1e-5)
    cache.reset()
    assert (cache.get_seq_length(), cache.state_bytes(), cache.softmax_bytes()) == (0, 0, 0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[:, 40:], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="cannot forget tokens"):
        cache.crop(-1)
    assert cache.get_seq_length() == 50


@torch.no_grad()
def test_generation_with_beams_padding_and_a_second_prompt() -> None:
    model = student()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    ids = tokens(2, 20)
    beams = options | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    rows = [tokens(1, 20, seed=1), tokens(1, 13, seed=2)]
    batch, mask = padded(rows, "left")
    together = model.generate(batch, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 20:], model.generate(row, **options)[0, row.shape[1] :])
    first = model.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, tokens(2, 11, seed=3)], 1)
    # Without a mask `generate` would take a generated 0 for padding.
    options["attention_mask"] = torch.ones_like(longer)
    again = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, model.generate(longer, use_cache=False, **options))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@torch.no_grad()
def test_kept_groups_keep_the_family_s_window_and_softcap(family: str) -> None:
    """Mistral's kept groups hold no more keys than its window has."""
    model, ids = (
        tiny_student(family, lc.LinearizeConfig(**BASE, softmax_heads={0: (1,)}), sliding_window=12),
        tokens(2, 50),
    )
    full = model(ids, use_cache=False).logits
    torch.testing.assert_close(decode(model, ids, 20), full, rtol=1e-5, atol=1e-5)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].kept[0].keys.shape == (2, 1, 11 if family == "mistral" else 50, 8)


def test_kept_groups_contribute_nothing_to_attention_transfer() -> None:
    whole, mixed = student(lc.LinearizeConfig(**BASE)), lc.linearize(tiny_teacher(**FOUR), KEPT)
    linear = {0: [0, 1, 2, 3, 6, 7], 1: list(range(8)), 2: [2, 3, 4, 5]}
    for name, parameter in named_map_parameters(mixed).items():
        parameter.data.copy_(named_map_parameters(whole)[name][linear[int(name.split(".")[2])]])
    for rows in (FakeRows(4), FakeRows(4, documents=True)):
        for params in (TransferParams(), TransferParams(xent_weight=1.0)):
            if params.xent_weight and rows.documents:
                continue
            mixed.zero_grad()
            whole.zero_grad()
            losses = transfer_losses(mixed, rows.batch(range(4)), params, scale=1.0)
            transfer_losses(whole, rows.batch(range(4)), params, scale=1.0)
            assert set(losses) == {"loss", "layer_000", "layer_001", "layer_002"}
            for name, parameter in named_map_parameters(mixed).items():
                heads = linear[int(name.split(".")[2])]
                expected = named_map_parameters(whole)[name].grad
                assert parameter.grad is not None
                assert expected is not None
                # Each layer's loss is the mean over its own linearized heads.
                torch.testing.assert_close(parameter.grad * len(heads) / 8, expected[heads], rtol=1e-4, atol=1e-6)


def test_lora_reaches_kept_and_linearized_heads_and_merges(tmp_path: Path) -> None:
    model, batch = student(), FakeRows(2).batch(range(2))
    adapted = add_lora(model, FinetuneParams(lora_rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    next_token_loss(adapted, batch).backward()
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name
    with torch.no_grad():
        expected = adapted(batch["input_ids"], use_cache=False).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(batch["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_choice_survives_saving_with_text_keys(tmp_path: Path) -> None:
    model, ids = student(), tokens(2, 40)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["linearize"]["softmax_heads"]
    assert stored == model.config.linearize["softmax_heads"] == {"0": [2], "2": [0, 3]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert lc.LinearizeConfig(**loaded.config.linearize) == KEPT
    assert hash(KEPT) == hash(lc.LinearizeConfig(**loaded.config.linearize))


def test_maps_of_other_groups_are_refused_although_their_shapes_fit(tmp_path: Path) -> None:
    lc.save_feature_maps(student(), tmp_path / "maps")
    other = lc.LinearizeConfig(**BASE, softmax_heads={0: (1,), 2: (0, 3)})
    with pytest.raises(UserError, match=r"made with `softmax_heads` \{'0': \[2\], .* has \{'0': \[1\],"):
        lc.load_feature_maps(student(other), tmp_path / "maps")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"softmax_heads": {7: [0]}}, r"`softmax_heads` must be below the 3 layers, got 7"),
        ("llama", {"softmax_heads": {1: [0, 2]}}, r"`softmax_heads` of layer 1 must be below its 2 kv heads, got 2"),
        ("llama", {"softmax_heads": {1: [0, 1]}}, r"names every kv head of layer 1; put it into `softmax_layers`"),
        ("gpt_neox", {"softmax_heads": {1: [4]}}, r"`softmax_heads` of layer 1 must be below its 4 kv heads, got 4"),
        ("gemma2", {"softmax_heads": {1: [0]}}, r"layer 1 in `softmax_heads` is a local layer"),
    ],
)
def test_choices_that_do_not_fit_the_model_are_refused(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        lc.linearize(tiny_teacher(family), lc.LinearizeConfig(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softmax_heads": {-1: [0]}}, r"`softmax_heads` must have layer indices of at least 0 as keys, got -1"),
        ({"softmax_heads": {"a": [0]}}, r"`softmax_heads` must have layer indices of at least 0 as keys, got 'a'"),
        ({"softmax_heads": {1: [0, -2]}}, r"`softmax_heads` of layer 1 must be kv heads of at least 0, got -2"),
        ({"softmax_heads": {1: [0], "1": [1]}}, r"`softmax_heads` names layer 1 twice"),
        ({"softmax_heads": {1: [0]}, "softmax_layers": [1]}, r"layer 1 is in `softmax_layers` and in `softmax_heads`"),
        ({"softmax_heads": [1]}, r"`linearize\.softmax_heads` must be a mapping, got \[1\]"),
        ({"softmax_heads": {1: 0}}, r"`linearize\.softmax_heads\.1` must be a list, got 0"),
        ({"softmax_heads": {1: ["x"]}}, r"`linearize\.softmax_heads\.1\[0\]` must be a whole number, got 'x'"),
    ],
)
def test_malformed_choices_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"linearize": settings})


def test_layers_that_keep_nothing_are_as_if_not_named() -> None:
    assert lc.LinearizeConfig(softmax_heads={"3": [], 1: [2, 0, 2]}) == lc.LinearizeConfig(softmax_heads={1: (0, 2)})

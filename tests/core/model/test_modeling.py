"""A linearized model is a transformers model: it saves, loads, decodes, batches and packs like one, exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.modeling import feature_maps, named_map_parameters
from tests.core.tiny import MIXED, SETTINGS, decode, tiny_student, tiny_teacher, tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_saving_and_loading_is_bitwise_in_every_family(family: str, tmp_path: Path) -> None:
    model, ids = tiny_student(family), tokens(2, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert lc.LinearizeConfig(**loaded.config.linearize) == MIXED


@torch.no_grad()
def test_left_padded_generation_equals_generation_alone() -> None:
    model = tiny_student()
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7], ids[0, :7] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)
    for i, start in ((0, 7), (1, 0)):
        alone = model.generate(ids[i : i + 1, start:], **options)
        assert torch.equal(together[i, start:], alone[0])


@torch.no_grad()
def test_a_cache_can_be_continued_and_stays_constant_in_size() -> None:
    model, ids = tiny_student(settings=SETTINGS), tokens(2, 90)
    cache = HybridCache(model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 31), (31, 60), (60, 90))]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    size = cache.state_bytes()
    for _ in range(30):
        model(ids[:, :1], past_key_values=cache)
    assert cache.state_bytes() == size > 0
    assert cache.get_seq_length() == 120


@torch.no_grad()
def test_beam_search_reorders_the_state() -> None:
    model, ids = tiny_student(), tokens(2, 20)
    options: dict[str, Any] = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **options)
    recomputed = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_the_family_s_own_window_and_softcap_hold_in_layers_that_stay_softmax(family: str) -> None:
    teacher = tiny_teacher(family, sliding_window=12)
    model = lc.linearize(teacher, lc.LinearizeConfig(window_size=8, softmax_layers=(0, 1, 2)))
    ids = tokens(2, 50)
    expected = teacher(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(model, ids, 20), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_local_layers_of_gemma_stay_and_the_others_decode_exactly() -> None:
    model = tiny_student("gemma2", SETTINGS)
    assert [name.split(".")[2] for name in feature_maps(model)] == ["0", "2"]
    ids = tokens(2, 50)
    torch.testing.assert_close(decode(model, ids, 20), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_shared_and_left_as_it_was() -> None:
    teacher = tiny_teacher()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in teacher.named_parameters()}
    model = lc.linearize(teacher, SETTINGS)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in teacher.named_parameters()} == before
    shared = dict(model.named_parameters())
    assert all(shared[name].data_ptr() == pointer for name, (pointer, _) in before.items())
    assert not feature_maps(teacher)
    assert teacher.config.model_type == "llama"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(named_map_parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_stay_float32_in_any_model_and_after_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_student(dtype=dtype)
    assert {p.dtype for p in named_map_parameters(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for name, parameter in named_map_parameters(loaded).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, named_map_parameters(model)[name])


def test_the_key_map_starts_as_the_query_map_and_gamma_at_its_value() -> None:
    for per in ("query_head", "kv_head"):
        settings = lc.LinearizeConfig(window_size=8, feature_dim=8, k_map_per=per, init_window_factor=0.25)
        maps = next(iter(feature_maps(lc.linearize(tiny_teacher(), settings)).values()))
        assert torch.equal(maps.w_k, maps.w_q if per == "query_head" else maps.w_q[::2])
        assert torch.allclose(maps.window_factor.sigmoid(), torch.tensor(0.25))


@torch.no_grad()
def test_identity_maps_take_the_activation_of_queries_and_keys_themselves() -> None:
    teacher, ids = tiny_teacher(), tokens(1, 60)
    identity = lc.linearize(teacher, lc.LinearizeConfig(window_size=8, feature_dim=8, feature_map_init="identity"))
    other = lc.linearize(teacher, SETTINGS)
    for maps in feature_maps(other).values():
        maps.w_q.copy_(torch.eye(8))
        maps.w_k.copy_(torch.eye(8))
    torch.testing.assert_close(other(ids).logits, identity(ids).logits)


def test_a_model_that_an_earlier_version_saved_with_options_that_are_gone_loads_unless_it_used_them(
    tmp_path: Path,
) -> None:
    model, ids = tiny_student(), tokens(1, 30)
    model.config.linearize |= {"feature_map_skip": False, "tie_qk": False}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["linearize"]["tie_qk"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    lc.save_feature_maps(model, tmp_path / "maps.safetensors")
    lc.load_feature_maps(loaded, tmp_path / "maps.safetensors")
    for changes, said in (
        ({"tie_qk": True}, "`tie_qk: True` is an option of an earlier version"),
        ({"feature_map_skip": True}, "`feature_map_skip: True` is an option of an earlier version"),
        ({"feature_map": "exp"}, "`feature_map` must be one of hedgehog, t2r, elu, got 'exp'"),
    ):
        with pytest.raises(UserError, match=said):
            lc.LinearizeConfig.from_dict({**MIXED.to_dict(), **changes})
    with pytest.raises(TypeError, match="never"):
        lc.LinearizeConfig.from_dict({**MIXED.to_dict(), "never": False})


def test_feature_maps_round_trip_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    first, second = lc.linearize(tiny_teacher(), SETTINGS, seed=1), lc.linearize(tiny_teacher(), SETTINGS, seed=2)
    lc.save_feature_maps(first, path)
    again = tmp_path / "again.safetensors"
    lc.save_feature_maps(first, again)
    assert again.read_bytes() == path.read_bytes()
    lc.load_feature_maps(second, path)
    for name, parameter in named_map_parameters(first).items():
        assert torch.equal(named_map_parameters(second)[name], parameter)
    with pytest.raises(UserError, match=r"is \(4, 8, 8\) instead of \(8, 8, 8\)"):
        lc.load_feature_maps(tiny_student(settings=SETTINGS, num_attention_heads=8), path)
    with pytest.raises(UserError, match="feature maps of another model or configuration"):
        lc.load_feature_maps(tiny_student(settings=SETTINGS, num_hidden_layers=2), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        lc.load_feature_maps(second, path)
    with pytest.raises(UserError, match="no such file"):
        lc.load_feature_maps(second, tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature_dim": 4}, "made with `feature_dim` 8, but the model has 4"),
        ({"window_size": 16}, "made with `window_size` 8, but the model has 16"),
        ({"window": "sliding"}, "made with `window` 'terraced', but the model has 'sliding'"),
        ({"k_map_per": "kv_head"}, "made with `k_map_per` 'query_head', but the model has 'kv_head'"),
        ({"feature_map": "t2r"}, "made with `feature_map` 'hedgehog', but the model has 't2r'"),
        ({"linear_factor": "affine"}, "made with `linear_factor` 'one', but the model has 'affine'"),
        ({"softmax_layers": (1,)}, r"made with `softmax_layers` \[\], but the model has \[1\]"),
    ],
)
def test_feature_maps_of_other_settings_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    lc.save_feature_maps(tiny_student(settings=SETTINGS), path)
    with pytest.raises(UserError, match=said):
        lc.load_feature_maps(tiny_student(settings=dataclasses.replace(SETTINGS, **changes)), path)


def test_settings_of_the_start_alone_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    lc.save_feature_maps(tiny_student(settings=SETTINGS), path)
    changed = dataclasses.replace(SETTINGS, init_window_factor=0.3, feature_map_init="identity")
    lc.load_feature_maps(tiny_student(settings=changed), path)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match="no `linearize` settings in it"):
        lc.load_feature_maps(tiny_student(settings=SETTINGS), path)


def test_a_checkpoint_without_maps_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    model = tiny_student(settings=SETTINGS)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    tiny_teacher().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"has no model\.layers\.0\.self_attn\.feature_maps"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_be_linearized_is_named() -> None:
    with pytest.raises(UserError, match="already a linearized model"):
        lc.linearize(tiny_student(), SETTINGS)
    with pytest.raises(UserError, match=r"`softmax_layers` must be below the 3 layers, got 7"):
        tiny_student(settings=lc.LinearizeConfig(softmax_layers=(7,)))
    with pytest.raises(UserError, match=r"needs `feature_dim` equal to the head dim 8, got 4"):
        tiny_student(settings=lc.LinearizeConfig(feature_dim=4, feature_map_init="identity"))


def test_wrong_use_is_refused_in_one_line() -> None:
    model, ids = tiny_student(), tokens(1, 9)
    with pytest.raises(UserError, match="must be a HybridCache, got DynamicCache; leave it out"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UserError, match=r"`attention_mask` of a linearized model must be \[B, S\]"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(UserError, match="must be lolcats_hybrid, got 'sdpa'"):
        model.set_attn_implementation("sdpa")
    cache = model(ids).past_key_values
    with pytest.raises(UserError, match="cannot forget tokens"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]


BARE = """
import sys, torch
sys.modules["lolcats_core"] = sys.modules["lolcats_kernels"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
other = AutoModelForCausalLM.from_pretrained(sys.argv[5], trust_remote_code=True)
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    try:
        sys.exit(f"{type(other)} computed {other(ids).logits}")
    except RuntimeError as error:
        assert str(error) == "code of the other", error
    torch.save(model(ids).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""
OTHER = """

def hybrid_attention_forward(*args, **kwargs):
    raise RuntimeError("code of the other")
"""


@pytest.mark.slow
def test_a_bare_directory_loads_bitwise_without_this_package_beside_another_with_other_code(tmp_path: Path) -> None:
    model, ids = tiny_student("qwen3"), tokens(2, 40)
    for name in ("a", "other"):
        model.save_pretrained(tmp_path / name)
    with (tmp_path / "other" / "lolcats_core_model_attention.py").open("a") as code:
        code.write(OTHER)
    torch.save(ids, tmp_path / "ids")
    for source, copy in (("a", "b"), ("b", "c")):
        arguments = [str(tmp_path / name) for name in (source, "ids", "logits", copy, "other")]
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", BARE, *arguments], check=True, cwd=tmp_path, env=environment)
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), model(ids).logits)

"""What cannot be linearized is refused by name, with a reason that holds in the installed transformers."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_core.model import families
from lolcats_core.model.families import FAMILIES, OBSTACLES, VISION, refusal
from lolcats_core.model.modeling import check_architecture, empty_student
from lolcats_core.training.losses import output_logits
from tests.core.tiny import tiny_teacher, tokens

NAMED = sorted(set().union(*(obstacle.names for obstacle in OBSTACLES)))
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 31,
}

GEMMA4: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 31,
    "hidden_size_per_layer_input": 8,
}


def modelling_code(name: str) -> str:
    """Source of the module that defines the causal language model of `name`."""
    entry = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return inspect.getsource(inspect.getmodule(getattr(transformers, entry)) or transformers)


def names_with(reason: str) -> list[str]:
    found = [obstacle for obstacle in OBSTACLES if reason in obstacle.reason]
    assert len(found) == 1
    return sorted(found[0].names & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("deepseek_v2", TINY, "multi-head latent attention"),
        ("deepseek_v3", TINY, "multi-head latent attention"),
        ("minicpm3", TINY, "multi-head latent attention"),
        ("mamba", TINY, "no softmax attention"),
        ("mamba2", {}, "no softmax attention"),
        ("rwkv", TINY, "no softmax attention"),
        ("jamba", TINY, "mixes attention with layers that are recurrent"),
        ("zamba2", {}, "mixes attention with layers that are recurrent"),
        ("qwen3_next", TINY, "mixes attention with layers that are recurrent"),
        ("lfm2", TINY, "mixes attention with layers that are recurrent"),
        ("t5", {}, "it is an encoder-decoder"),
        ("bart", {}, "it is an encoder-decoder"),
        ("bert", TINY, "it is an encoder, whose tokens also see later ones"),
        ("gpt_oss", TINY, "learned attention sink"),
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}, "ALiBi"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
        ("falcon", TINY | {"alibi": True}, "ALiBi"),
        ("falcon", TINY, "not through transformers' attention interface"),
        ("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "not through transformers' attention interface"),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "learned position embeddings end"),
        ("opt", TINY, "learned position embeddings end"),
        ("llama4_text", TINY, "attend within chunks"),
        ("gemma3n_text", {}, "reuse the keys and values of earlier ones"),
        ("diffllama", TINY, "subtracts one softmax attention from another"),
        ("gemma4_text", {}, "heads of another number and size"),
        ("stablelm", TINY, "hand no keyword arguments to their attention"),
        ("nemotron", TINY, "hand no keyword arguments to their attention"),
        ("mixtral", TINY, "choose among experts"),
        ("qwen3_moe", TINY, "choose among experts"),
        ("granitemoe", TINY, "choose among experts"),
        ("olmoe", TINY, "choose among experts"),
        ("gemma3", {}, "give its language model alone"),
        ("gemma3_text", TINY | {"use_bidirectional_attention": True}, "`use_bidirectional_attention`"),
        ("arcee", TINY, "not among the tested ones, llama, mistral"),
    ],
)
def test_each_kind_is_refused_by_name_before_any_weight_is_made(name: str, changes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^architecture '{name}' cannot be linearized: .*") as caught:
        empty_student(CONFIG_MAPPING[name](**changes), lc.LinearizeConfig())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_is_refused_as_its_configuration_is() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](n_embd=8, n_head=2, n_layer=1, vocab_size=11))
    with pytest.raises(UserError, match="architecture 'gpt2' cannot be linearized: its learned position embeddings"):
        lc.linearize(model, lc.LinearizeConfig())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"text_config": {}}, "give its language model alone"),
        ({"layer_types": ["full_attention", "mamba"]}, "mixes attention"),
        ({"mamba_d_state": 16}, "mixes attention"),
        ({"kv_lora_rank": 8}, "multi-head latent attention"),
        ({"num_kv_shared_layers": 2}, "reuse the keys and values"),
        ({"n_routed_experts": 8}, "choose among experts"),
        ({"num_experts": 1}, "not among the tested ones"),
        ({"layer_types": 3}, "not among the tested ones"),
        ({}, "not among the tested ones"),
    ],
)
def test_unknown_architectures_are_judged_by_their_values(values: dict[str, Any], reason: str) -> None:
    assert reason in str(refusal(values | {"model_type": "new"}))


def test_exactly_the_supported_families_pass() -> None:
    assert lc.supported_architectures() == (*FAMILIES, *VISION)
    assert not set(NAMED) & {*FAMILIES, *VISION}
    for name, family in FAMILIES.items():
        config_class, _ = family.resolve()
        assert config_class.model_type == name
        assert refusal(config_class().to_dict()) is None, name
        check_architecture(config_class(), lc.LinearizeConfig())


def test_every_name_is_one_that_transformers_has() -> None:
    assert [name for name in NAMED if name not in CONFIG_MAPPING_NAMES] == []


def test_the_reasons_hold_in_the_code_of_transformers() -> None:
    for name in names_with("attention interface"):
        assert "ALL_ATTENTION_FUNCTIONS" not in modelling_code(name), name
    for name in names_with("attention sink"):
        assert "sinks" in modelling_code(name), name
    for name in names_with("(ALiBi)"):
        assert "build_alibi_tensor" in modelling_code(name) or "build_mpt_alibi_tensor" in modelling_code(name), name
    for name in names_with("learned position embeddings"):
        code = modelling_code(name)
        assert "position_embed" in code or "wpe" in code or "embed_positions" in code, name
        assert "rotary" not in code, name
    for name in names_with("multi-head latent attention"):
        assert getattr(CONFIG_MAPPING[name](), "kv_lora_rank", None), name
    for name in names_with("encoder-decoder"):
        assert CONFIG_MAPPING[name]().is_encoder_decoder, name
    for name in names_with("no keyword arguments"):
        (call,) = re.findall(r"self\.self_attn\((.*?)\n        \)", modelling_code(name), re.DOTALL)
        assert "position_embeddings" in call, name
        assert "kwargs" not in call, name
    for name in names_with("choose among experts"):
        assert get_checkpoint_conversion_mapping(name), name
    for name in names_with("another number and size"):
        layers = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**TINY, **GEMMA4)).base_model.layers
        assert layers[0].self_attn.head_dim != layers[1].self_attn.head_dim
    for name in names_with("no softmax attention"):
        assert "softmax(" not in modelling_code(name), name


def test_the_table_imports_no_library_so_that_a_teacher_is_checked_at_once() -> None:
    imports = [node for node in ast.parse(inspect.getsource(families)).body if isinstance(node, ast.ImportFrom)]
    assert {node.module.partition(".")[0] for node in imports if node.module} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_its_model_is_so(name: str) -> None:
    family, teacher = FAMILIES[name], tiny_teacher(name)
    for layer in teacher.base_model.layers:
        assert isinstance(getattr(getattr(layer, family.attention), family.head_dim), int)
    embedding = teacher.get_input_embeddings().weight
    assert next(key for key, p in teacher.named_parameters() if p is embedding).endswith(f".{family.embedding}.weight")
    for key in filter(None, (family.logits_factor, family.logits_divisor, family.logits_softcap)):
        assert hasattr(teacher.config, key)
    with torch.no_grad():
        hidden = teacher.base_model(tokens(2, 9), use_cache=False).last_hidden_state
        assert torch.equal(output_logits(teacher, hidden), teacher(tokens(2, 9), use_cache=False).logits)
    code = modelling_code(name)
    assert ("logit_scale" in code) == (family.logits_factor is not None)
    assert ("logits_scaling" in code) == (family.logits_divisor is not None)
    assert ("final_logit_softcapping" in code) == (family.logits_softcap is not None)

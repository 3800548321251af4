"""Linearized models where people use models of transformers: they do as those do, or refuse by name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
)

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.modeling import auto_classes, linearize, named_map_parameters
from lolcats_core.model.transformers_versions import CACHE
from tests.core.tiny import BOUNDED, SETTINGS, tiny_student, tiny_teacher, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


# generate


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generating_while_training_gives_the_same_text(checkpointing: bool) -> None:
    model, ids = tiny_student(), tokens(2, 20)
    expected = model.generate(ids, **GREEDY)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_training_makes_no_cache_unless_it_is_asked_for() -> None:
    model, ids = tiny_student().train(), tokens(2, 20)
    assert model(ids).get(CACHE) is None
    assert isinstance(model(ids, use_cache=True)[CACHE], HybridCache)
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).get(CACHE) is None
    with pytest.raises(UserError, match="must be None with gradient checkpointing"):
        model(ids, **{CACHE: HybridCache(model.config)})


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prefill_in_chunks_gives_the_same_text(chunk: int) -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["static", "dynamic", "quantized", "offloaded"])
def test_another_kind_of_cache_is_refused_by_name(kind: str) -> None:
    model, ids = tiny_student(), tokens(1, 9)
    with pytest.raises(UserError, match=f"`cache_implementation` of a linearized model must be None, got '{kind}'"):
        model.generate(ids, cache_implementation=kind, **GREEDY)
    with pytest.raises(UserError, match="must be None"):
        model.generate(ids, generation_config=GenerationConfig(cache_implementation=kind, **GREEDY))


def test_a_kind_of_cache_that_the_teacher_names_does_not_stop_its_student() -> None:
    model, ids = tiny_student(), tokens(1, 9)
    expected = model.generate(ids, **GREEDY)
    model.generation_config.cache_implementation = "hybrid"
    assert torch.equal(model.generate(ids, **GREEDY), expected)


# What only softmax models have


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_weights_are_refused_by_name_in_every_family(family: str) -> None:
    model, ids = tiny_student(family), tokens(1, 9)
    for run in (model, model.base_model):
        with pytest.raises(UserError, match="`output_attentions` of a linearized model must be False"):
            run(ids, output_attentions=True)
    with pytest.raises(UserError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_another_attention_function_is_refused_by_name_wherever_it_is_asked_for(name: str, tmp_path: Path) -> None:
    model, ids = tiny_student(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    said = f"`attn_implementation` of a linearized model must be lolcats_hybrid, got '{name}'"
    with pytest.raises(UserError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=said):
        AutoModelForCausalLM.from_config(config, attn_implementation=name)
    # The configuration of a loaded model decides at every pass.
    model.config._attn_implementation = name
    with pytest.raises(UserError, match=said):
        model(ids)


# Other classes


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_automodel_is_the_decoder_of_every_family(family: str, tmp_path: Path) -> None:
    model, ids = tiny_student(family), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    # By position, as embedding libraries call a decoder.
    found, expected = decoder(ids, mask), model.base_model(input_ids=ids, attention_mask=mask)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    decoder.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids, mask).last_hidden_state, expected.last_hidden_state)


def classifier_name(family: str) -> str:
    """What transformers would call the family's classifier."""
    return FAMILIES[family].classes[1].replace("ForCausalLM", "ForSequenceClassification")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_classifier_has_the_student_s_decoder_wherever_the_family_has_a_classifier(
    family: str, tmp_path: Path
) -> None:
    model, ids = tiny_student(family), tokens(2, 20)
    model.save_pretrained(tmp_path)
    if "AutoModelForSequenceClassification" not in auto_classes(model.config):
        assert not hasattr(transformers, classifier_name(family))
        with pytest.raises(ValueError, match=type(model.config).__name__):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        return
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    hidden = classifier.base_model(ids).last_hidden_state
    assert torch.equal(hidden, model.base_model(ids).last_hidden_state)
    assert torch.equal(classifier(ids).logits, classifier.score(hidden)[:, -1])
    classifier.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, classifier(ids).logits)


def test_every_class_is_made_from_a_configuration_too_one_without_an_attention_function(tmp_path: Path) -> None:
    tiny_student().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("attn_implementation") == "lolcats_hybrid"
    (tmp_path / "config.json").write_text(json.dumps(values))  # as earlier versions wrote it
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        auto.from_config(AutoConfig.from_pretrained(tmp_path))(tokens(1, 9))
        auto.from_pretrained(tmp_path)(tokens(1, 9))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_every_trainable_parameter_of_a_loaded_student_has_a_gradient(auto: Any, tmp_path: Path) -> None:
    """Or data-parallel training waits for one that never comes."""
    tiny_student().save_pretrained(tmp_path)
    model, ids = auto.from_pretrained(tmp_path).train(), tokens(2, 30)
    model(ids, labels=ids if auto is AutoModelForCausalLM else torch.zeros(2, dtype=torch.long)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_softmax_class_refuses_a_student(tmp_path: Path) -> None:
    model, ids = tiny_student(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LlamaAttention is an attention layer of a softmax model, but the checkpoint"):
        LlamaForCausalLM.from_pretrained(tmp_path)(ids)


WITHOUT_THIS_PACKAGE = """
import sys
from transformers import LlamaForCausalLM
try:
    LlamaForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "lolcats_hybrid" in str(error), error
else:
    raise SystemExit("loaded")
"""


def test_a_softmax_class_refuses_a_student_where_this_package_is_not_installed(tmp_path: Path) -> None:
    tiny_student().save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", WITHOUT_THIS_PACKAGE, str(tmp_path)], check=True, cwd=tmp_path)


def test_a_linearized_class_refuses_a_teacher_and_a_teacher_without_a_language_model_head_is_refused(
    tmp_path: Path,
) -> None:
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="`config` of LolcatsLlamaForCausalLM has no `linearize`"):
        type(tiny_student()).from_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"must be a causal language model; {type(model).__name__} has no "):
            linearize(model, SETTINGS)


# accelerate


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_offloaded_weights_give_the_same_text(where: str, tmp_path: Path) -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(2, 20)
    expected = model.generate(ids, **GREEDY)
    if where == "cpu":
        offloaded = accelerate.cpu_offload(copy.deepcopy(model))
    elif where == "disk":
        offloaded = accelerate.disk_offload(copy.deepcopy(model), tmp_path)
    else:
        model.save_pretrained(tmp_path / "model")
        places = {name: "cpu" for name, _ in model.named_children()} | {"model": "cpu", "model.layers.1": "disk"}
        del places["model"]
        places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
        places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
        )
    assert any(parameter.is_meta for parameter in named_map_parameters(offloaded).values())
    assert torch.equal(offloaded.generate(ids, **GREEDY), expected)


def test_a_pass_over_several_devices_has_its_masks_on_each() -> None:
    mask = torch.tensor([[False, True]])
    context = HybridContext(padding_mask=mask, past_length=1)
    assert context.to("cpu") is context
    elsewhere = context.to(torch.device("meta"), non_blocking=True)
    assert elsewhere.padding_mask is not None
    assert elsewhere.padding_mask.is_meta
    assert elsewhere.past_length == 1
    assert context.to("meta") is elsewhere


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_cast_model_is_the_one_that_is_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny_student(), tokens(1, 30)
    maps = {name: parameter.clone() for name, parameter in named_map_parameters(model).items()}
    cast = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
    assert cast.lm_head.weight.dtype == dtype
    cast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for found in (cast, loaded):
        for name, parameter in named_map_parameters(found).items():
            assert torch.equal(parameter, maps[name])
    # transformers' own casts leave the rotary frequencies in less precision than loading does.
    cast.model.rotary_emb = loaded.model.rotary_emb
    torch.testing.assert_close(cast(ids).logits, loaded(ids).logits)

"""Which families are served: those for which vLLM has a class that calls its attention with plain q, k and v."""

from __future__ import annotations

from typing import Any

from lolcats_core.model.families import FAMILIES, PREFIX

_MODELS = "vllm.model_executor.models"
# vLLM's class that runs transformers' own modelling code with vLLM's layers and attention in it.
_TRANSFORMERS = f"{_MODELS}.transformers:TransformersForCausalLM"
# By the teacher's `model_type`, vLLM's class of the softmax model.
SERVED = {
    "llama": f"{_MODELS}.llama:LlamaForCausalLM",
    "mistral": f"{_MODELS}.mistral:MistralForCausalLM",
    "qwen2": f"{_MODELS}.qwen2:Qwen2ForCausalLM",
    "qwen3": f"{_MODELS}.qwen3:Qwen3ForCausalLM",
    "phi3": f"{_MODELS}.phi3:Phi3ForCausalLM",
    "granite": f"{_MODELS}.granite:GraniteForCausalLM",
    "gemma2": f"{_MODELS}.gemma2:Gemma2ForCausalLM",
    "gemma3_text": f"{_MODELS}.gemma3:Gemma3ForCausalLM",
    "olmo2": _TRANSFORMERS,
    "smollm3": _TRANSFORMERS,
}


def architecture(family: str) -> str:
    """The linearized model's class, as config.json names it."""
    return f"Lolcats{FAMILIES[family].classes[1]}"


def teacher_family(config: Any) -> str:
    """The teacher's `model_type` from a linearized model's configuration."""
    return str(config.model_type).removeprefix(PREFIX)


def layer_kinds(config: Any) -> list[str] | None:
    """`layer_types` as the checkpoint has them, not as the hooks show them to vLLM."""
    kinds: list[str] | None = getattr(config, "layer_kinds", None) or getattr(config, "layer_types", None)
    return kinds


def teacher_config(config: Any) -> Any:
    """The softmax model's configuration, which vLLM's class is built from, out of a linearized model's."""
    config_class, model_class = FAMILIES[teacher_family(config)].resolve()
    dropped = ("model_type", "linearize", "auto_map", "attn_implementation", "layer_types", "layer_kinds")
    values = {key: value for key, value in config.to_dict().items() if key not in dropped}
    kinds = layer_kinds(config)
    if kinds is not None:
        values["layer_types"] = kinds
    plain = config_class(**values)
    plain.architectures = [model_class.__name__]
    return plain

"""The one table of families: which can be linearized, what each needs besides, and why every other one cannot.

Linearizing replaces the attention function between the projections (with their norms and rotary embeddings) and the
output projection. So it needs a causal decoder that calls transformers' attention interface with plain q, k and v, and
whose scores are q k^T, scaled and at most soft-capped. A new family is one entry of `FAMILIES`; classes are named and
looked up when they are needed, so that checking a teacher loads no modelling code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "lolcats_"


@dataclass(frozen=True)
class Family:
    """A family that can be linearized, and where it departs from Llama.

    Attributes:
        classes: its configuration and its causal language model, by their names in transformers.
        attention: name of a layer's attention module. head_dim: that module's name for its head dimension.
        rotary_interleaved: whether dims that rotate together stand side by side instead of half a head apart.
        embedding: last part of the input embedding's name in a checkpoint.
        renamed: names in checkpoints that the model's parameters no longer have.
        logits_divisor, logits_softcap: values of the configuration that logits are divided by, and bounded by through
            cap tanh(logits / cap), in this order; None where there is no such value.
    """

    classes: tuple[str, str]
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    rotary_interleaved: bool = False
    embedding: str = "embed_tokens"
    renamed: Mapping[str, str] = field(default_factory=dict)
    logits_divisor: str | None = None
    logits_softcap: str | None = None

    def resolve(self) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """The classes."""
        import transformers

        config, model = (getattr(transformers, name) for name in self.classes)
        return config, model


# By `model_type`.
FAMILIES = {
    "llama": Family(("LlamaConfig", "LlamaForCausalLM")),
    "mistral": Family(("MistralConfig", "MistralForCausalLM")),
    "qwen2": Family(("Qwen2Config", "Qwen2ForCausalLM")),
    "qwen3": Family(("Qwen3Config", "Qwen3ForCausalLM")),
    "phi3": Family(("Phi3Config", "Phi3ForCausalLM")),
    "olmo2": Family(("Olmo2Config", "Olmo2ForCausalLM")),
    "smollm3": Family(("SmolLM3Config", "SmolLM3ForCausalLM")),
    "granite": Family(("GraniteConfig", "GraniteForCausalLM"), logits_divisor="logits_scaling"),
    "gemma2": Family(("Gemma2Config", "Gemma2ForCausalLM"), logits_softcap="final_logit_softcapping"),
    "gemma3_text": Family(("Gemma3TextConfig", "Gemma3ForCausalLM"), logits_softcap="final_logit_softcapping"),
    "gpt_neox": Family(
        ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
        attention="attention",
        head_dim="head_size",
        embedding="embed_in",
        renamed={"embed_out.weight": "lm_head.weight"},
    ),
}


@dataclass(frozen=True)
class Obstacle:
    """Why an architecture cannot be linearized.

    Attributes:
        reason: completes "architecture X cannot be linearized: …".
        names: `model_type` of architectures that are known to have it.
        sign: whether the values of a configuration show it, for those that are not known by name.
    """

    reason: str
    names: frozenset[str]
    sign: Callable[[Mapping[str, Any]], bool] = lambda values: False


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _recurrent(values: Mapping[str, Any]) -> bool:
    kinds = f"{values.get('layer_types')} {values.get('layers_block_type')}"
    named = any(f"'{kind}'" in kinds for kind in ("linear_attention", "mamba", "conv", "recurrent", "hybrid"))
    return named or any(key.startswith(("mamba_", "ssm_")) for key in values)


# The first that applies is named, so the more fundamental ones come first.
OBSTACLES = (
    Obstacle(
        "it is an encoder-decoder, whose decoder also attends to the encoder; only decoders alone are linearized",
        _names(
            "t5 mt5 umt5 longt5 switch_transformers t5gemma t5gemma2 bart mbart plbart mvp pegasus pegasus_x"
            " bigbird_pegasus blenderbot blenderbot-small led marian m2m_100 nllb-moe fsmt prophetnet whisper"
            " encoder-decoder"
        ),
        lambda values: bool(values.get("is_encoder_decoder")),
    ),
    Obstacle(
        "it is an encoder, whose tokens also see later ones; the hybrid attention is causal",
        _names(
            "bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl camembert electra distilbert albert ernie"
            " deberta deberta-v2 mpnet modernbert eurobert rembert roformer roc_bert megatron-bert mobilebert big_bird"
            " data2vec-text xmod"
        ),
    ),
    Obstacle(
        "its tokens also see later ones (`use_bidirectional_attention`); the hybrid attention is causal",
        frozenset(),
        lambda values: values.get("use_bidirectional_attention") in (True, "all"),
    ),
    Obstacle(
        "it takes images or sound besides text; give its language model alone",
        _names("gemma3 gemma3n gemma4 llama4 mllama mistral3 llava qwen2_vl qwen2_5_vl qwen3_vl paligemma idefics3"),
        lambda values: "text_config" in values,
    ),
    Obstacle(
        "it has no softmax attention; its layers are recurrent already",
        _names("mamba mamba2 falcon_mamba rwkv xlstm"),
    ),
    Obstacle(
        "it mixes attention with layers that are recurrent or convolutions already, whose states the cache of"
        " linearized models does not hold",
        _names(
            "jamba bamba zamba zamba2 falcon_h1 nemotron_h granitemoehybrid recurrent_gemma qwen3_next qwen3_5_text"
            " qwen3_5_moe_text olmo_hybrid lfm2 lfm2_moe lfm3 minimax kimi_linear bailing_hybrid"
        ),
        _recurrent,
    ),
    Obstacle(
        "multi-head latent attention makes keys and values from one low-rank vector that all heads share, so there are"
        " no kv heads to linearize",
        _names("deepseek_v2 deepseek_v3 deepseek_v32 minicpm3 longcat_flash glm4_moe_lite glm_moe_dsa mistral4 youtu"),
        lambda values: bool(values.get("kv_lora_rank")),
    ),
    Obstacle(
        "its softmax has a learned attention sink in the denominator, which the softmax window does not have",
        _names("gpt_oss granite_swa granitemoe_swa mimo_v2_flash flint deepseek_v4"),
    ),
    Obstacle(
        "positions enter as a bias on the scores (ALiBi) and not through q and k, so linear attention would not know"
        " where a key stands",
        _names("bloom mpt"),
        lambda values: bool(values.get("alibi")),
    ),
    Obstacle(
        "its layers attend within chunks and scale queries by their position",
        _names("llama4_text"),
        lambda values: bool(values.get("attention_chunk_size")),
    ),
    Obstacle(
        "its later layers reuse the keys and values of earlier ones",
        _names("gemma3n_text"),
        lambda values: bool(values.get("num_kv_shared_layers")),
    ),
    Obstacle("each of its heads subtracts one softmax attention from another", _names("diffllama")),
    Obstacle("it adds a learned mask to its scores", _names("doge")),
    Obstacle(
        "its attention is computed in its own modelling code and not through transformers' attention interface",
        _names("gptj gpt_neo gpt_neox_japanese codegen falcon"),
    ),
    Obstacle(
        "its learned position embeddings end with its context, so it cannot use a state for longer texts",
        _names("gpt2 gpt_bigcode opt biogpt openai-gpt"),
    ),
)


def refusal(values: Mapping[str, Any]) -> str | None:
    """Why a teacher cannot be linearized, in one line; None where it can.

    Args:
        values: of its config.json, checked or not, or `to_dict()` of its configuration.
    """
    name = values.get("model_type")
    for obstacle in OBSTACLES:
        if str(name) in obstacle.names or obstacle.sign(values):
            return f"architecture {name!r} cannot be linearized: {obstacle.reason}"
    if isinstance(name, str) and name in FAMILIES:
        return None
    return f"architecture {name!r} cannot be linearized: it is not among the tested ones, {', '.join(FAMILIES)}"


def family_of(config: PreTrainedConfig) -> Family:
    """The entry of a supported teacher's or a linearized model's configuration."""
    return FAMILIES[config.model_type.removeprefix(PREFIX)]

"""The one table of families: which can be linearized, what each needs besides, and why every other one cannot.

Linearizing replaces the attention function between the projections (with their norms and rotary embeddings) and the
output projection. So it needs a model that calls transformers' attention interface with plain q, k and v: a causal
decoder, whose scores are q k^T, scaled and at most soft-capped, or a vision transformer, whose patches all see each
other and whose scores have no bias. A new family is one entry of `FAMILIES` or of `VISION`; classes are named and
looked up when they are needed, so that checking a teacher loads no modelling code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "lolcats_"
Modality = Literal["text", "image"]


@dataclass(frozen=True)
class Family:
    """A family that can be linearized, and where it departs from Llama.

    Attributes:
        classes: its configuration and its causal language model, by their names in transformers.
        attention: name of a layer's attention module. head_dim: that module's name for its head dimension.
        rotary_interleaved: whether dims that rotate together stand side by side instead of half a head apart.
        global_rotary: whether layers that see everything are rotated where others are local.
        embedding: last part of the input embedding's name in a checkpoint.
        renamed: names in checkpoints that the model's parameters no longer have.
        logits_factor, logits_divisor, logits_softcap: values of the configuration that logits are multiplied by,
            divided by, and bounded by through cap tanh(logits / cap), in this order; None where there is no such value.
    """

    classes: tuple[str, str]
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    rotary_interleaved: bool = False
    global_rotary: bool = True
    embedding: str = "embed_tokens"
    renamed: Mapping[str, str] = field(default_factory=dict)
    logits_factor: str | None = None
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
    "olmo": Family(("OlmoConfig", "OlmoForCausalLM")),
    "olmo3": Family(("Olmo3Config", "Olmo3ForCausalLM")),
    "ministral": Family(("MinistralConfig", "MinistralForCausalLM")),
    "gemma": Family(("GemmaConfig", "GemmaForCausalLM")),
    "glm": Family(("GlmConfig", "GlmForCausalLM"), rotary_interleaved=True),
    "glm4": Family(("Glm4Config", "Glm4ForCausalLM"), rotary_interleaved=True),
    "cohere2": Family(
        ("Cohere2Config", "Cohere2ForCausalLM"),
        rotary_interleaved=True,
        global_rotary=False,
        logits_factor="logit_scale",
    ),
    "starcoder2": Family(("Starcoder2Config", "Starcoder2ForCausalLM")),
    "phi": Family(("PhiConfig", "PhiForCausalLM")),
    "apertus": Family(("ApertusConfig", "ApertusForCausalLM")),
    "seed_oss": Family(("SeedOssConfig", "SeedOssForCausalLM")),
    "ernie4_5": Family(("Ernie4_5Config", "Ernie4_5ForCausalLM"), rotary_interleaved=True),
    "exaone4": Family(("Exaone4Config", "Exaone4ForCausalLM"), global_rotary=False),
    "gpt_neox": Family(
        ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
        attention="attention",
        head_dim="head_size",
        embedding="embed_in",
        renamed={"embed_out.weight": "lm_head.weight"},
    ),
}


@dataclass(frozen=True)
class VisionFamily:
    """A family of vision transformers that can be linearized.

    Attributes:
        config: its configuration, by its name in transformers.
        layers: path of the list of layers in the backbone. attention: name of a layer's attention module.
        prefix: tokens before the patches (CLS, distillation), besides `num_register_tokens` of a configuration.
        interpolates: whether a forward pass must be told to take images of another size than the configuration's.
        packed: images come as rows of flattened patches with a mask and their sizes (NaFlex).
    """

    config: str
    layers: str
    attention: str
    prefix: int
    interpolates: bool = True
    packed: bool = False


# By `model_type`.
VISION = {
    "vit": VisionFamily("ViTConfig", "layers", "attention", 1),
    "deit": VisionFamily("DeiTConfig", "layers", "attention", 2),
    "ijepa": VisionFamily("IJepaConfig", "layers", "attention", 0),
    "dinov2": VisionFamily("Dinov2Config", "encoder.layer", "attention", 1, interpolates=False),
    "dinov2_with_registers": VisionFamily(
        "Dinov2WithRegistersConfig", "encoder.layer", "attention", 1, interpolates=False
    ),
    "dinov3_vit": VisionFamily("DINOv3ViTConfig", "model.layer", "attention", 1, interpolates=False),
    "clip_vision_model": VisionFamily("CLIPVisionConfig", "encoder.layers", "self_attn", 1),
    "siglip_vision_model": VisionFamily("SiglipVisionConfig", "encoder.layers", "self_attn", 0),
    "siglip2_vision_model": VisionFamily(
        "Siglip2VisionConfig", "encoder.layers", "self_attn", 0, interpolates=False, packed=True
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


def _experts(values: Mapping[str, Any]) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(number := values.get(name), int) and number > 1 for name in names)


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
        "it is an encoder, whose tokens also see later ones; attention in both directions is there for images alone",
        _names(
            "bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl camembert electra distilbert albert ernie"
            " deberta deberta-v2 mpnet modernbert eurobert rembert roformer roc_bert megatron-bert mobilebert big_bird"
            " data2vec-text xmod"
        ),
    ),
    Obstacle(
        "its tokens also see later ones (`use_bidirectional_attention`); attention in both directions is there for"
        " images alone",
        frozenset(),
        lambda values: values.get("use_bidirectional_attention") in (True, "all"),
    ),
    Obstacle(
        "it joins an image encoder and a text encoder; give its vision model alone",
        _names("clip siglip siglip2 chinese_clip"),
    ),
    Obstacle(
        "its patches attend within windows that move and merge from stage to stage, so there is little to make linear",
        _names("swin swinv2 hiera"),
    ),
    Obstacle(
        "its scores have a learned bias by relative position, which linear attention cannot add",
        _names("sam sam_vision_model sam_hq"),
        lambda values: bool(
            values.get("use_relative_position_bias")
            or values.get("use_shared_relative_position_bias")
            or values.get("use_rel_pos")
        ),
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
    Obstacle(
        "its global layers have heads of another number and size than the local ones, which its configuration counts",
        _names("gemma4_text"),
        lambda values: bool(values.get("global_head_dim")),
    ),
    Obstacle(
        "its layers hand no keyword arguments to their attention, so the cache, the padding and the documents of a pass"
        " do not reach it",
        _names("stablelm nemotron"),
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
    Obstacle(
        "its feed-forward layers choose among experts, which a checkpoint holds one by one and the model joined: its"
        " layers cannot be read one at a time, and what fits into memory is told for dense layers alone",
        _names("mixtral qwen2_moe qwen3_moe olmoe flex_olmo granitemoe phimoe ernie4_5_moe glm4_moe"),
        _experts,
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
    if isinstance(name, str) and name in {**FAMILIES, **VISION}:
        return None
    tested = ", ".join((*FAMILIES, *VISION))
    return f"architecture {name!r} cannot be linearized: it is not among the tested ones, {tested}"


def modality(values: Mapping[str, Any]) -> Modality:
    """What a supported teacher or a linearized model takes, by the values of its configuration."""
    return "image" if str(values.get("model_type")).removeprefix(PREFIX) in VISION else "text"


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether a supported teacher or a linearized model is a vision transformer."""
    return modality({"model_type": config.model_type}) == "image"


def family_of(config: PreTrainedConfig) -> Family:
    """The entry of a supported teacher's or a linearized model's configuration."""
    return FAMILIES[config.model_type.removeprefix(PREFIX)]


def vision_family_of(config: PreTrainedConfig) -> VisionFamily:
    """The same of a vision transformer."""
    return VISION[config.model_type.removeprefix(PREFIX)]

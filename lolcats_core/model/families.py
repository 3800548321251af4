"""Which teachers can be linearized, and for every other one the reason why not.

Linearizing replaces the attention function between the projections (with their norms and rotary embeddings) and the
output projection. So it needs a causal decoder that calls transformers' attention interface with plain q, k and v, and
whose scores are q k^T, scaled and at most soft-capped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
)


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
    if name in ARCHITECTURES:
        return None
    return f"architecture {name!r} cannot be linearized: it is not among the tested ones, {', '.join(ARCHITECTURES)}"

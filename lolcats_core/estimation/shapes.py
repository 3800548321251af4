"""Shapes of the models that presets name, so that needs can be told before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """What decides a decoder's size. `gated`: the weights need an accepted licence."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    gated: bool = False

    @property
    def layer_parameters(self) -> int:
        """Projections and gated MLP of one layer (norms are left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.key_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.layer_parameters + self.vocab * self.hidden * (1 if self.tied else 2)

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a transformers configuration of a supported family."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )


_LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, gated=True)
KNOWN_MODELS = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, gated=True),
    "meta-llama/Llama-3.1-405B": ModelShape(126, 16384, 53248, 128, 8, 128, 128256, gated=True),
    "mistralai/Mistral-7B-v0.1": ModelShape(32, 4096, 14336, 32, 8, 128, 32000),
}

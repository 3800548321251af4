"""How large a model is, how much memory each stage then needs, and how it therefore runs.

The shapes of the models that presets name stand here, so that needs can be told before anything is downloaded.

Joint and streamed attention transfer end in different weights, so a change here can change results: the stages that
ask this module list it in dvc.yaml. `doctor` and `plan` print the same estimates.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from lolcats_common.params import Params
from lolcats_core.model.forward import MAX_FLOAT_LOGITS

logger = logging.getLogger(__name__)
GIB = 2**30
# Share of a device's memory up to which an estimate counts as fitting.
FITS = 0.9


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


def train_memory(params: Params, shape: ModelShape) -> dict[str, float]:
    """`transfer_memory` and `finetune_memory` by their stage."""
    return {"transfer": transfer_memory(params, shape), "finetune": finetune_memory(params, shape)}


def transfer_memory(params: Params, shape: ModelShape) -> float:
    """Bytes on the training device at the peak of a joint stage 1: the weights and one layer's work (an estimate)."""
    wide = _bytes(params)
    # The MLP's gate, its activation and its product live at once; or two sets of states.
    passing = 4 * wide * shape.hidden + max(3 * wide * shape.intermediate, 2 * _attention(params, shape))
    tokens = params.transfer.batch_size * params.data.sequence_length
    return shape.parameters * wide + 16 * _maps(params, shape) + tokens * passing


def finetune_memory(params: Params, shape: ModelShape) -> float:
    """Bytes on the training device at the peak of stage 2 (an estimate).

    It holds the weights and every layer's graph; with gradient checkpointing one layer's graph and every layer's input.
    """
    wide = _bytes(params)
    queries = shape.heads * shape.head_dim
    attention = _attention(params, shape)
    # Two norms keep their float32 inputs and their outputs, the adapters float32 inputs.
    kept = 2 * (4 + wide) * shape.hidden + 4 * (3 * shape.hidden + queries) + attention + 3 * wide * shape.intermediate
    tokens = params.finetune.batch_size * params.data.sequence_length
    graph = kept * shape.layers
    if params.compute.gradient_checkpointing:
        graph = 2 * kept + wide * shape.hidden * shape.layers
    # Beyond `MAX_FLOAT_LOGITS` they are made a slice at a time.
    logits = min(tokens * shape.vocab, MAX_FLOAT_LOGITS) * (wide + 3 * 4)
    trained = 16 if params.finetune.train_feature_maps else 4
    lora = 16 * params.finetune.lora_rank * shape.layers * 8 * shape.hidden
    return shape.parameters * wide + trained * _maps(params, shape) + lora + tokens * graph + logits


def streamed_memory(params: Params, shape: ModelShape) -> float:
    """Bytes on the training device at the peak of a streamed stage 1: `transfer_memory` of one layer alone, with the
    batch that is read ahead and the two that are written behind.

    The embedding is there before the first layer, and alone.
    """
    wide = _bytes(params)
    one = replace(shape, layers=1)
    embeddings = one.parameters - one.layer_parameters
    under_way = 3 * params.transfer.batch_size * params.data.sequence_length * shape.hidden * wide
    whole = transfer_memory(params, one) - embeddings * wide + under_way
    return max(whole, wide * shape.vocab * shape.hidden)


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device, the machine's for the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def choose_transfer_mode(params: Params, shape: ModelShape, device: torch.device) -> str:
    """How stage 1 runs on `device`, ``joint`` or ``streamed``, and why as a log line."""
    memory = device_memory(device)
    mode = transfer_mode(params, shape, memory)
    need = transfer_memory(params, shape) if mode == "joint" else streamed_memory(params, shape)
    logger.info("transfer: %s (about %.1f GiB of %.0f GiB)", mode, need / GIB, memory / GIB)
    return mode


def transfer_mode(params: Params, shape: ModelShape, memory: float) -> str:
    """``joint`` or ``streamed``: what `transfer.mode: auto` means for `memory` bytes on the training device."""
    if not params.transfer.enabled:
        return "joint"
    if params.transfer.mode != "auto":
        return params.transfer.mode
    # Several processes divide the weights.
    elsewhere = shape.parameters * _bytes(params) * (1 - 1 / params.compute.processes)
    return "joint" if transfer_memory(params, shape) - elsewhere < FITS * memory else "streamed"


def evaluated_by_layers(params: Params, shape: ModelShape, memory: float) -> bool:
    """Whether stage `evaluate` runs models layer by layer, since the weights leave no room in `memory` bytes."""
    return shape.parameters * _bytes(params) >= FITS * memory


def _bytes(params: Params) -> int:
    """Bytes of a frozen weight and of an activation."""
    return 2 if params.compute.precision == "bfloat16" else 4


def _maps(params: Params, shape: ModelShape) -> int:
    """Parameters of all layers' feature maps and window factors."""
    return shape.layers * (2 * shape.heads * shape.head_dim * params.linearize.feature_dim + shape.heads)


def _attention(params: Params, shape: ModelShape) -> float:
    """Bytes per token that one layer's attention holds: projected, rotated and mixed rows, and the chunks' states.

    In bfloat16 the fused kernels keep the chunks' float32 states alone; in float32 (the CPU's precision) the chunked
    form keeps scores and features besides.
    """
    wide = _bytes(params)
    features, window = 2 * params.linearize.feature_dim, params.linearize.window_size
    queries, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    attention = wide * 2 * (queries + keys) + 4 * shape.heads * features * shape.head_dim / window
    if wide == 4:
        attention += 4 * shape.heads * (8 * window + 6 * features + 8 * shape.head_dim)
    return attention

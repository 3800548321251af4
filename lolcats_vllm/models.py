"""Linearized models as vLLM models: one mixin over the classes that vLLM has for their teachers."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import extract_layer_index

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, local_layers
from lolcats_core.model.modeling import LINEARIZED, attention_layers
from lolcats_core.model.rotary import Rotary
from lolcats_vllm.attention import LinearizedAttention
from lolcats_vllm.families import SERVED, architecture, layer_kinds, teacher_config, teacher_family
from lolcats_vllm.state import head_dim, page_shapes, plans


class LinearizedMixin:
    """The softmax model, with `LinearizedAttention` in every layer that has a state."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        plain = teacher_config(config)
        rotary = _rotary_embeddings(config)
        with _shown(vllm_config.model_config, plain):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        layers = plans(config)
        for name, module in list(self.named_modules()):  # type: ignore[attr-defined]
            if isinstance(module, Attention):
                layer = extract_layer_index(name)
                _check_softmax(module, plain, layer)
                if layers[layer].parts:
                    owner, _, attribute = name.rpartition(".")
                    ours = LinearizedAttention(module, config, layer, rotary[layer])
                    setattr(self.get_submodule(owner), attribute, ours)  # type: ignore[attr-defined]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        return page_shapes(vllm_config.model_config.hf_config, vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return torch.float32, vllm_config.model_config.dtype

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return get_temporal_copy_spec, get_temporal_copy_spec

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the softmax model, and the feature maps of every linearized layer.

        Raises:
            UserError: a map is missing from the checkpoint, or has another shape.
        """
        # By their names in a checkpoint, where they stand beside the projections.
        ours = {
            name.replace(".attn.feature_maps.", ".feature_maps."): (name, parameter)
            for name, parameter in self.named_parameters()  # type: ignore[attr-defined]
            if ".feature_maps." in name
        }
        found: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in ours:
                    _copy(ours[name][1], tensor, name)
                    found.add(ours[name][0])
                elif not name.endswith("linearized.weight"):  # a zero, which tells students from teachers
                    yield name, tensor

        loaded: set[str] = super().load_weights(others())  # type: ignore[misc]
        missing = sorted(key for key, (name, _) in ours.items() if name not in found)
        if missing:
            raise UserError(f"the checkpoint has no {missing[0]}: not a linearized model")
        return loaded | found


def _copy(parameter: nn.Parameter, tensor: Tensor, name: str) -> None:
    if parameter.shape != tensor.shape:
        shapes = f"{tuple(tensor.shape)} instead of {tuple(parameter.shape)}"
        raise UserError(f"{name} of the checkpoint is {shapes}; made with other `linearize` parameters")
    parameter.data.copy_(tensor)


@contextlib.contextmanager
def _shown(model_config: Any, plain: Any) -> Iterator[None]:
    """Inside the block, vLLM's classes see the configuration of the softmax model."""
    own = model_config.hf_config, model_config.hf_text_config
    model_config.hf_config = model_config.hf_text_config = plain
    try:
        yield
    finally:
        model_config.hf_config, model_config.hf_text_config = own


def _rotary_embeddings(config: Any) -> list[Rotary | None]:
    """How each layer's q and k are rotated; None where nothing reads it."""
    if LinearizeConfig.from_dict(config.linearize).feature_positions != "unrotated":
        return [None] * config.num_hidden_layers
    own = copy.deepcopy(config)
    own.layer_types = layer_kinds(config)
    own._attn_implementation = None
    with torch.device("meta"):
        student = LINEARIZED[teacher_family(config)][1](own)
    embeddings: dict[int, nn.Module] = {}

    def with_values(rotary: Rotary | None) -> Rotary | None:
        if rotary is None:
            return None
        empty: Any = rotary.embedding
        with torch.device("cpu"):
            full = embeddings.setdefault(id(empty), type(empty)(config=own))
        return Rotary(full, rotary.buffer, rotary.interleaved)

    maps = [getattr(layer, "feature_maps", None) for layer in attention_layers(student)]
    return [None if each is None else with_values(each.rotary) for each in maps]


def _check_softmax(module: Attention, plain: Any, layer: int) -> None:
    """Refuse where vLLM would compute a kept layer otherwise than transformers."""
    everything = "full_attention" in (getattr(plain, "layer_types", None) or ()) and layer not in local_layers(plain)
    window = None if everything else getattr(plain, "sliding_window", None)
    cap = getattr(plain, "attn_logit_softcapping", None) or 0
    for name, ours, theirs in (
        ("window", window, module.sliding_window),
        ("head dim", head_dim(plain), module.head_size),
        ("bound on scores", cap, getattr(module.impl, "logits_soft_cap", cap) or 0),
    ):
        if ours != theirs:
            raise UserError(
                f"vLLM gives layer {layer} a {name} of {theirs}, and the model's is {ours}; it is not served"
            )


def _model_class(family: str) -> type:
    module, _, name = SERVED[family].partition(":")
    base = getattr(importlib.import_module(module), name)
    return type(
        architecture(family),
        (LinearizedMixin, base, HasInnerState, IsHybrid),
        {"__module__": __name__, "__doc__": f"{name}, linearized."},
    )


def __getattr__(name: str) -> type:
    """The class of a served family, made where vLLM asks for it by its name."""
    for family in SERVED:
        if architecture(family) == name:
            made = globals()[name] = _model_class(family)
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Rotary embeddings of a student's attention layers: by what they turn, and by the fused kernel where it applies.

transformers' attention layers call a function of their own module. A student's layers run the same code in a twin of
that module, in which the name stands for the kernel; neither transformers' modules nor other models are touched.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
RotaryFunction = Callable[..., tuple[Tensor, Tensor]]


# Kinds of rotary embeddings whose frequencies change with the length of the sequence.
CHANGING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rotary:
    """How one layer's q and k are rotated: by the frequencies in a buffer of the decoder's rotary embedding.

    The buffer is read when it is needed: a model may be built on ``meta``, and moved.
    """

    embedding: nn.Module
    buffer: str
    interleaved: bool

    def frequencies(self, device: torch.device) -> Tensor:
        """[P] radians per token, of the first 2 P dims of a head."""
        return getattr(self.embedding, self.buffer).to(device)


def layer_rotary(decoder: nn.Module, layer: Any, interleaved: bool) -> Rotary | None:
    """The layer's rotary embedding, or None where it has none (SmolLM3 leaves it out in some layers)."""
    embedding: Any = getattr(decoder, "rotary_emb", None)
    if embedding is None or not getattr(layer, "use_rope", True):
        return None
    own = f"{getattr(layer, 'layer_type', None)}_inv_freq"  # Gemma 3 has one for each kind of layer
    return Rotary(embedding, own if hasattr(embedding, own) else "inv_freq", interleaved)


def changing_frequencies(config: Any) -> str | None:
    """The kind of a configuration's rotary embedding where its frequencies follow the length, or None."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = {values.get("rope_type") for values in (given, *given.values()) if isinstance(values, dict)}
    return next((kind for kind in CHANGING if kind in kinds), None)


def fuse_rotary(layer: nn.Module) -> None:
    """Let the attention layer rotate q and k in one pass on a GPU; what the kernel does not take stays as it was."""
    forward: Any = inspect.unwrap(type(layer).forward)  # transformers wraps it while it renames an argument
    code = getattr(forward, "__code__", None)  # none of a forward that is no plain function
    if code is None or NAME not in code.co_names:
        return
    twin = _twin(forward.__module__).__dict__
    copy = FunctionType(code, twin, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    layer.forward = MethodType(copy, layer)


@lru_cache
def _twin(name: str) -> ModuleType:
    """A module with the names of module `name` and ours in the place of `NAME`; importable, as torch.compile needs."""
    original = vars(sys.modules[name])
    twin = ModuleType(f"{__name__}.{name.rpartition('.')[2]}")
    vars(twin).update({key: value for key, value in original.items() if key not in ("__name__", "__spec__")})
    vars(twin)[NAME] = _where_it_applies(original[NAME])
    sys.modules[twin.__name__] = twin
    return twin


def _where_it_applies(own: RotaryFunction) -> RotaryFunction:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused = None if args or kwargs else kernel_for(q)
        # Some families rotate a part of the head only, or in float32.
        if fused is None or cos.shape[-1] != q.shape[-1] or not q.dtype == k.dtype == cos.dtype == sin.dtype:
            return own(q, k, cos, sin, *args, **kwargs)
        return fused(q, k, cos, sin)

    return apply_rotary_pos_emb


def kernel_for(q: Tensor) -> RotaryFunction | None:
    """The fused operator; None off the GPU, where triton is not, and in the copy of this code beside a saved model."""
    if not q.is_cuda:
        return None
    try:
        from lolcats_kernels.rotary_embedding import fused
    except ImportError:
        return None
    return fused.rotary_embedding

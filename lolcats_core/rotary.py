"""Rotary embeddings of a student's attention layers by the fused kernel, where it applies.

transformers' attention layers call a function of their own module; a student's layers run a copy of `forward` in which
that name stands for the kernel. Neither transformers' modules nor other models in the process are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(layer: nn.Module) -> None:
    """Let the attention layer rotate q and k in one pass on a GPU; what the kernel does not take stays as it was."""
    forward: Any = type(layer).forward
    own = getattr(forward, "__globals__", {}).get(NAME)
    if own is None or NAME not in forward.__code__.co_names:
        return
    names = {**forward.__globals__, NAME: _where_it_applies(own)}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    layer.forward = MethodType(copy, layer)


def _where_it_applies(own: Rotary) -> Rotary:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused = None if args or kwargs else kernel_for(q)
        # Some families rotate a part of the head only, or in float32.
        if fused is None or cos.shape[-1] != q.shape[-1] or not q.dtype == k.dtype == cos.dtype == sin.dtype:
            return own(q, k, cos, sin, *args, **kwargs)
        return fused(q, k, cos, sin)

    return apply_rotary_pos_emb


def kernel_for(q: Tensor) -> Rotary | None:
    """The fused operator; None off the GPU, where triton is not, and in the copy of this code beside a saved model."""
    if not q.is_cuda:
        return None
    try:
        from lolcats_kernels.rotary_embedding import fused
    except ImportError:
        return None
    return fused.rotary_embedding

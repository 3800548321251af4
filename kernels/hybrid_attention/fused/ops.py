"""The fused kernels as operators of torch: autograd, and opaque to `torch.compile`.

# B batch, T tokens, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns, E features
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import Maps, Spec
from lolcats_kernels.hybrid_attention.feature_maps import feature_count
from lolcats_kernels.hybrid_attention.fused import launch
from lolcats_kernels.hybrid_attention.fused.decode import decode as launch_decode
from lolcats_kernels.hybrid_attention.fused.layout import Sequences
from lolcats_kernels.hybrid_attention.state import HybridState

# A copy of this file beside a saved model's weights may be loaded in the same process: its operators need other names.
_PACKAGE = __name__.startswith("lolcats_kernels.")
_NAMESPACE = "lolcats" if _PACKAGE else f"lolcats_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"
__all__ = ["decode", "forward", "launch", "transfer_errors"]
MAP_NAMES = ("w_q", "w_k", "gamma", "alpha", "b_q", "b_k")


def _call(
    q: Tensor, k: Tensor, v: Tensor, maps: Maps, spec: Spec, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> launch.Call:
    sequences = Sequences(q.shape[0], q.shape[1], q.device, cu_seqlens, lengths)
    return launch.Call.of(q, k, v, maps, spec, sequences)


@torch.library.custom_op(f"{_NAMESPACE}::hybrid_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor, alpha: Tensor | None, b_q: Tensor | None,
    b_k: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, s: Tensor | None, z: Tensor | None,
    window: str, window_size: int, feature_map: str, scale: float, softcap: float | None, end: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(window, window_size, feature_map, scale, softcap)
    call = _call(q, k, v, Maps(w_q, w_k, gamma, alpha, b_q, b_k), spec, cu_seqlens, lengths)
    initial = None if s is None or z is None else call.padded_state((s, z))
    final = call.empty_sums(call.sequences.count) if end else None
    den = call.per_token() if keep else None
    y = launch.forward(call, initial, final, den)
    none = [q.new_empty(0, dtype=torch.float32) for _ in range(3)]
    s_end, z_end = none[:2] if final is None else call.cropped_state(final)
    return y, s_end, z_end, none[2] if den is None else den


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor, alpha: Tensor | None, b_q: Tensor | None,
    b_k: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, s: Tensor | None, z: Tensor | None,
    window: str, window_size: int, feature_map: str, scale: float, softcap: float | None, end: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, tokens, heads, _ = q.shape
    den = q.new_empty((batch, heads, tokens) if keep else 0, dtype=torch.float32)
    if not end:
        return y, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32), den
    count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    features = feature_count(feature_map, w_q.shape[-1])
    z_end = q.new_empty(count, w_k.shape[0], features, dtype=torch.float32)
    return y, z_end.new_empty(*z_end.shape, v.shape[-1]), z_end, den


@torch.library.custom_op(f"{_NAMESPACE}::hybrid_backward", mutates_args=())
def _backward(
    grad: Tensor, y: Tensor, den: Tensor, q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor,
    alpha: Tensor | None, b_q: Tensor | None, b_k: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    s: Tensor | None, z: Tensor | None, window: str, window_size: int, feature_map: str, scale: float,
    softcap: float | None, maps: bool,
) -> list[Tensor]:  # fmt: skip
    spec = Spec(window, window_size, feature_map, scale, softcap)
    call = _call(q, k, v, Maps(w_q, w_k, gamma, alpha, b_q, b_k), spec, cu_seqlens, lengths)
    initial = None if s is None or z is None else call.padded_state((s, z))
    dq, dk, dv, of_maps = launch.backward(call, y, den, grad, initial, maps=maps)
    gradients = [dq, dk, dv]
    if of_maps is not None:
        gradients += [x for name in MAP_NAMES if (x := getattr(of_maps, name)) is not None]
    return gradients


@_backward.register_fake
def _(
    grad: Tensor, y: Tensor, den: Tensor, q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor,
    alpha: Tensor | None, b_q: Tensor | None, b_k: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    s: Tensor | None, z: Tensor | None, window: str, window_size: int, feature_map: str, scale: float,
    softcap: float | None, maps: bool,
) -> list[Tensor]:  # fmt: skip
    gradients = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v)]
    if maps:
        like = [w_q, w_k, gamma, gamma, *([] if b_q is None or b_k is None else [b_q, b_k])]
        gradients += [torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in like]
    return gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tensors, options = inputs[:13], inputs[13:18]
    ctx.given = [x is not None for x in tensors]
    ctx.save_for_backward(output[0], output[3], *(x for x in tensors if x is not None))
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    y, den, *saved = ctx.saved_tensors
    grad = torch.zeros_like(y) if grad is None else grad
    rest = iter(saved)
    tensors = [next(rest) if given else None for given in ctx.given]
    wanted = ctx.needs_input_grad[:13]
    maps = any(wanted[3:9])
    gradients = iter(_backward(grad, y, den, *tensors, *ctx.options, maps))
    result: list[Tensor | None] = [next(gradients) for _ in range(3)]
    for index in range(3, 9):
        # The kernels give alpha's gradient also where it stands for 1.
        value = next(gradients) if maps and (ctx.given[index] or index == 6) else None
        given = tensors[index]
        result.append(value.to(given.dtype) if wanted[index] and value is not None and given is not None else None)
    return (*(x if need else None for x, need in zip(result, wanted[:9], strict=True)), *[None] * 11)


_forward.register_autograd(_differentiate, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Maps,
    spec: Spec,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    end: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Outputs [B, T, H, D] and, with `end`, S [n, Hs, E, D] and z [n, Hs, E] of what the last token sees linearly.

    Args:
        state: S and z of tokens before the first chunk, float32. Differentiable in everything but states.
    """
    s, z = (None, None) if state is None else state
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *maps.tensors()))
    y, s_end, z_end, _ = _forward(
        q, k, v, maps.w_q, maps.w_k, maps.gamma, maps.alpha, maps.b_q, maps.b_k, cu_seqlens, lengths, s, z,
        spec.window, spec.window_size, spec.feature_map, spec.scale, spec.softcap, end, keep,
    )  # fmt: skip
    return y, (s_end, z_end) if end else None


@torch.library.custom_op(f"{_NAMESPACE}::hybrid_decode", mutates_args=("s", "z", "ring_k", "ring_v", "length"))
def _decode(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor, alpha: Tensor | None, b_q: Tensor | None,
    b_k: Tensor | None, s: Tensor, z: Tensor, ring_k: Tensor, ring_v: Tensor, length: Tensor,
    window: str, window_size: int, feature_map: str, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    spec = Spec(window, window_size, feature_map, scale, softcap)
    state = HybridState(s, z, ring_k, ring_v, length)
    return launch_decode(q, k, v, Maps(w_q, w_k, gamma, alpha, b_q, b_k), spec, state)


@_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gamma: Tensor, alpha: Tensor | None, b_q: Tensor | None,
    b_k: Tensor | None, s: Tensor, z: Tensor, ring_k: Tensor, ring_v: Tensor, length: Tensor,
    window: str, window_size: int, feature_map: str, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode(q: Tensor, k: Tensor, v: Tensor, maps: Maps, spec: Spec, state: HybridState) -> Tensor:
    """y [B, 1, H, D] of one new token of each sequence; `state` is updated in place."""
    return _decode(
        q, k, v, maps.w_q, maps.w_k, maps.gamma, maps.alpha, maps.b_q, maps.b_k, *vars(state).values(),
        spec.window, spec.window_size, spec.feature_map, spec.scale, spec.softcap,
    )  # fmt: skip


class _Transfer(torch.autograd.Function):
    """Sum of squared errors; the gradients come with the forward pass and are only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: launch.Call, target: Tensor, *maps: Tensor | None) -> Tensor:
        needed = any(ctx.needs_input_grad)
        loss, gradients = launch.transfer(call, target, gradients=needed)
        if gradients is not None:
            found = [None if x is None else getattr(gradients, name) for name, x in zip(MAP_NAMES, maps, strict=True)]
            ctx.given = [x is not None for x in found]
            ctx.dtypes = [None if x is None else x.dtype for x in maps]
            ctx.save_for_backward(*(x for x in found if x is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [next(saved) if given else None for given in ctx.given]
        scaled = [
            (2 * grad * x).to(dtype) if x is not None and need else None
            for x, dtype, need in zip(found, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *scaled


@torch.compiler.disable
def transfer_errors(
    q: Tensor, k: Tensor, v: Tensor, target: Tensor, maps: Maps, spec: Spec, *, cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Sum of squared differences between the output and `target` [B, T, H, D], float32; differentiable in the maps."""
    call = _call(q, k, v, maps, spec, cu_seqlens, lengths)
    return _Transfer.apply(call, target, *(getattr(maps, name) for name in MAP_NAMES))

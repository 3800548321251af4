"""The fused kernels as operators of torch: autograd, and opaque to `torch.compile`.

# B batch, T tokens, H query heads, Hk key/value heads, Hs heads of the state, D head dim, F map columns, E features
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import feature_count
from lolcats_kernels.hybrid_attention.fused import launch
from lolcats_kernels.hybrid_attention.fused.decode import decode as launch_decode
from lolcats_kernels.hybrid_attention.fused.layout import Sequences
from lolcats_kernels.hybrid_attention.state import HybridState

# A copy of this file beside a saved model's weights may be loaded in the same process: its operators need other names.
_PACKAGE = __name__.startswith("lolcats_kernels.")
_NAMESPACE = "lolcats" if _PACKAGE else f"lolcats_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"
__all__ = ["decode", "forward", "launch", "transfer_errors"]
# Torch's schemas of the inputs below, which the operators take one by one.
_QKV = "Tensor q, Tensor k, Tensor v"
_WEIGHTS = "Tensor w_q, Tensor w_k, Tensor window_factor, Tensor? linear_factor, Tensor? b_q, Tensor? b_k"
_CONFIG = "float scale, float? softcap, str window, int window_size, str feature_map"
_INPUTS = f"{_QKV}, {_WEIGHTS}, Tensor? cu_seqlens, Tensor? lengths, Tensor? s, Tensor? z, {_CONFIG}"
STATE = ("s", "z", "ring_k", "ring_v", "length")
WEIGHTS = ("w_q", "w_k", "window_factor", "linear_factor", "b_q", "b_k")


class Inputs(NamedTuple):
    """What the forward and the backward operator take of a call, in this order; s and z are the initial state's."""

    q: Tensor
    k: Tensor
    v: Tensor
    w_q: Tensor
    w_k: Tensor
    window_factor: Tensor
    linear_factor: Tensor | None
    b_q: Tensor | None
    b_k: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    s: Tensor | None
    z: Tensor | None
    scale: float
    softcap: float | None
    window: str
    window_size: int
    feature_map: str

    def call(self) -> tuple[launch.Call, launch.State | None]:
        """The call in the kernels' terms, and its initial state."""
        weights = HybridWeights(self.w_q, self.w_k, self.window_factor, self.linear_factor, self.b_q, self.b_k)
        config = HybridConfig(self.scale, self.softcap, self.window, self.window_size, self.feature_map)
        call = _call(self.q, self.k, self.v, weights, config, self.cu_seqlens, self.lengths)
        return call, None if self.s is None or self.z is None else call.padded_state((self.s, self.z))

    def given_weights(self) -> list[str]:
        """The names of those that are there."""
        return [name for name in WEIGHTS if getattr(self, name) is not None]


TENSORS = Inputs._fields[: Inputs._fields.index("scale")]
SETTINGS = Inputs._fields[len(TENSORS) :]
POSITION = {name: position for position, name in enumerate(Inputs._fields)}


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> launch.Call:
    sequences = Sequences(q.shape[0], q.shape[1], q.device, cu_seqlens, lengths)
    return launch.Call.of(q, k, v, weights, config, sequences)


def _forward_on_device(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and where asked for (else empty) S and z behind each sequence and the denominators that gradients need."""
    *inputs, output_final_state, keep = args
    call, initial = Inputs(*inputs).call()
    final = call.empty_sums(call.sequences.count) if output_final_state else None
    den = call.per_token() if keep else None
    y = launch.forward(call, initial, final, den)
    none = [y.new_empty(0, dtype=torch.float32) for _ in range(3)]
    s_end, z_end = none[:2] if final is None else call.cropped_state(final)
    return y, s_end, z_end, none[2] if den is None else den


_forward = torch.library.custom_op(
    f"{_NAMESPACE}::hybrid_forward",
    _forward_on_device,
    mutates_args=(),
    schema=f"({_INPUTS}, bool output_final_state, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, output_final_state, keep = args
    x = Inputs(*inputs)
    y = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    batch, tokens, heads, dim = x.q.shape
    den = y.new_empty((batch, heads, tokens) if keep else 0, dtype=torch.float32)
    if not output_final_state:
        return y, y.new_empty(0, dtype=torch.float32), y.new_empty(0, dtype=torch.float32), den
    count = batch if x.cu_seqlens is None else len(x.cu_seqlens) - 1
    features = feature_count(x.feature_map, x.w_q.shape[-1])
    z_end = y.new_empty(count, x.w_k.shape[0], features, dtype=torch.float32)
    return y, z_end.new_empty(*z_end.shape, dim), z_end, den


def _backward_on_device(grad: Tensor, y: Tensor, den: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of q, k and v and, with `of_weights`, of the given weights in their order."""
    *inputs, of_weights = args
    x = Inputs(*inputs)
    call, initial = x.call()
    dq, dk, dv, weights = launch.backward(call, y, den, grad, initial, maps=of_weights)
    return [dq, dk, dv] + ([] if weights is None else [getattr(weights, name) for name in x.given_weights()])


_backward = torch.library.custom_op(
    f"{_NAMESPACE}::hybrid_backward",
    _backward_on_device,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor y, Tensor den, {_INPUTS}, bool of_weights) -> Tensor[]",
)


@_backward.register_fake
def _(grad: Tensor, y: Tensor, den: Tensor, *args: Any) -> list[Tensor]:
    *inputs, of_weights = args
    x = Inputs(*inputs)
    weights = [getattr(x, name) for name in x.given_weights()] if of_weights else []
    gradients = [torch.empty(each.shape, dtype=x.q.dtype, device=x.q.device) for each in x[:3]]
    return gradients + [torch.empty(each.shape, dtype=torch.float32, device=x.q.device) for each in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.settings = inputs[: len(TENSORS)], inputs[len(TENSORS) : len(POSITION)]
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(output[0], output[3], *(x for x in tensors if x is not None))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    y, den, *saved = ctx.saved_tensors
    rest = iter(saved)
    tensors: Any = (next(rest) if present else None for present in ctx.present)
    x = Inputs(*tensors, *ctx.settings)
    needed = ctx.needs_input_grad
    of_weights = any(needed[POSITION[name]] for name in WEIGHTS)
    gradients = _backward(torch.zeros_like(y) if grad is None else grad, y, den, *x, of_weights)
    names = ("q", "k", "v", *(x.given_weights() if of_weights else ()))
    result: list[Tensor | None] = [None] * len(needed)
    for name, gradient in zip(names, gradients, strict=True):
        position = POSITION[name]
        if needed[position]:
            result[position] = gradient.to(getattr(x, name).dtype)
    return tuple(result)


_forward.register_autograd(_differentiate, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Outputs [B, T, H, D] and, with `output_final_state`, what each sequence's last token sees linearly.

    Args:
        initial_state: S and z of tokens before the first chunk, float32. Differentiable in everything but states.

    Returns:
        y, and S [n, Hs, E, D] and z [n, Hs, E] or None.
    """
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *weights.tensors()))
    y, s_end, z_end, _ = _forward(
        q, k, v, *_tensors(weights), cu_seqlens, lengths, *(initial_state or (None, None)), *_settings(config),
        output_final_state, keep,
    )  # fmt: skip
    return y, (s_end, z_end) if output_final_state else None


def _tensors(weights: HybridWeights) -> tuple[Tensor | None, ...]:
    return tuple(getattr(weights, name) for name in WEIGHTS)


def _settings(config: HybridConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in SETTINGS)


def _decode_on_device(*args: Any) -> Tensor:
    q, k, v, *rest = args
    weights, config = rest[: len(WEIGHTS)], rest[-len(SETTINGS) :]
    state = rest[len(WEIGHTS) : -len(SETTINGS)]
    return launch_decode(q, k, v, HybridWeights(*weights), HybridConfig(*config), HybridState(*state))


_decode = torch.library.custom_op(
    f"{_NAMESPACE}::hybrid_decode",
    _decode_on_device,
    mutates_args=("s", "z", "ring_k", "ring_v", "length"),
    schema=f"({_QKV}, {_WEIGHTS}, Tensor(a!) s, Tensor(b!) z, Tensor(c!) ring_k, Tensor(d!) ring_v,"
    f" Tensor(e!) length, {_CONFIG}) -> Tensor",
)


@_decode.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode(q: Tensor, k: Tensor, v: Tensor, weights: HybridWeights, config: HybridConfig, state: HybridState) -> Tensor:
    """y [B, 1, H, D] of one new token of each sequence; `state` is updated in place."""
    return _decode(q, k, v, *_tensors(weights), *(getattr(state, name) for name in STATE), *_settings(config))


class _Transfer(torch.autograd.Function):
    """Sum of squared errors; the gradients come with the forward pass and are only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: launch.Call, target: Tensor, *weights: Tensor | None) -> Tensor:
        loss, gradients = launch.transfer(call, target, gradients=any(ctx.needs_input_grad))
        if gradients is not None:
            ctx.dtypes = [None if x is None else x.dtype for x in weights]
            ctx.save_for_backward(
                *(getattr(gradients, name) for name, x in zip(WEIGHTS, weights, strict=True) if x is not None)
            )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [None if dtype is None else next(saved) for dtype in ctx.dtypes]
        scaled = [
            (2 * grad * x).to(dtype) if x is not None and need else None
            for x, dtype, need in zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *scaled


@torch.compiler.disable
def transfer_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor,
    weights: HybridWeights,
    config: HybridConfig,
    *,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """Sum of squared differences to `target` [B, T, H, D], float32; differentiable in the weights."""
    call = _call(q, k, v, weights, config, cu_seqlens, lengths)
    return _Transfer.apply(call, target, *_tensors(weights))

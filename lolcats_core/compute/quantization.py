"""Frozen projections in 4-bit NormalFloat, for stage 2 on a small GPU (QLoRA, arXiv 2305.14314, section 3).

Plain PyTorch, so that it runs wherever the rest does, CPU included; bitsandbytes does the same with kernels of its own.
Only what the weights occupy shrinks: products are computed in the dtype of the activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Quantiles of a normal distribution in [-1, 1] with an exact zero (the paper's appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Weights that share one scale.
BLOCK = 64


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] → codes, uint8 [out in / 2] (two to a byte), and scales, float32 [out in / 64].

    Raises:
        ValueError: `in` is no multiple of 64.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK}, got {tuple(weight.shape)}")
    levels = torch.tensor(NF4, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    blocks = weight.detach().float().view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], middles)
    pairs = codes.to(torch.uint8).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], scales


def dequantize(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weights that `quantize` put into codes, [out, in]."""
    levels = torch.tensor(NF4, device=codes.device, dtype=dtype)
    # Both weights of a byte at once.
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    values = F.embedding(codes.int(), table).view(-1, BLOCK)
    return (values * scales[:, None].to(dtype)).view(shape)


class _Product(torch.autograd.Function):
    """x W^T, which keeps the codes for the backward pass and not W."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return x @ dequantize(codes, scales, shape, x.dtype).T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        codes, scales = ctx.saved_tensors
        return grad @ dequantize(codes, scales, ctx.shape, grad.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` whose `weight` holds the codes; LoRA goes on top of it like on any other."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scales = quantize(linear.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales, persistent=True)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of `x`."""
        shape = torch.Size((self.out_features, self.in_features))
        y = _Product.apply(x, self.weight, self.scales, shape)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantize_projections(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside `module` whose inputs are a multiple of 64."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and child.in_features % BLOCK == 0:
            setattr(module, name, QuantizedLinear(child))
        else:
            quantize_projections(child)

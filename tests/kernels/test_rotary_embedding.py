"""The fused rotary embedding is the families' own function: outputs, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lolcats_kernels.rotary_embedding.fused import rotary_embedding
from tests.kernels.operands import DEVICE


def operands(
    heads: int, key_heads: int, dim: int, tokens: int, dtype: torch.dtype = torch.float32, shared: bool = False
) -> list[Tensor]:
    """q, k as attention layers hold them, a view of [B, T, H D], and angles of every row or of all."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    q, k = (draw(2, tokens, n * dim).requires_grad_() for n in (heads, key_heads))
    angles = [draw(1 if shared else 2, tokens, dim) for _ in range(2)]
    return [q, k, *angles]


def rotated(function: object, tensors: list[Tensor], heads: int, key_heads: int) -> list[Tensor]:
    """Both outputs and, for upstream gradients in another memory layout, both gradients."""
    q, k = (x.detach().clone().requires_grad_() for x in tensors[:2])
    views = [x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, key_heads))]
    found = function(*views, *tensors[2:])  # type: ignore[operator]
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=DEVICE).to(y.dtype) for y in found]
    torch.autograd.backward(found, upstream)
    assert q.grad is not None
    assert k.grad is not None
    return [*found, q.grad, k.grad]


@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "tokens", "shared"),
    [(4, 2, 32, 5, False), (3, 1, 96, 7, True), (8, 8, 64, 1, False), (6, 2, 48, 3, True)],
)
def test_equals_the_families_function(heads: int, key_heads: int, dim: int, tokens: int, shared: bool) -> None:
    tensors = operands(heads, key_heads, dim, tokens, shared=shared)
    found = rotated(rotary_embedding, tensors, heads, key_heads)
    expected = rotated(apply_rotary_pos_emb, tensors, heads, key_heads)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_outputs_lie_in_memory_as_the_attention_reads_them() -> None:
    tensors = operands(4, 2, 32, 5)
    q, k, *_ = rotated(rotary_embedding, tensors, 4, 2)
    assert q.transpose(1, 2).is_contiguous()
    assert k.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = operands(32, 8, 128, 333, dtype)
    found = rotated(rotary_embedding, tensors, 32, 8)
    expected = rotated(apply_rotary_pos_emb, tensors, 32, 8)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_compiles() -> None:
    tensors = operands(4, 2, 64, 33, torch.bfloat16)
    found = rotated(torch.compile(rotary_embedding), tensors, 4, 2)
    for one, other in zip(found, rotated(rotary_embedding, tensors, 4, 2), strict=True):
        assert torch.equal(one, other)

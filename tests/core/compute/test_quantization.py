"""Four-bit projections: the nearest level, a backward pass through the same weights, and LoRA on top."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lolcats_common.params import FinetuneParams
from lolcats_core.compute.quantization import NF4, QuantizedLinear, dequantize, quantize, quantize_projections
from lolcats_core.model.modeling import linearize
from lolcats_core.streaming.student import load_student
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from tests.core.tiny import SETTINGS, FakeRows, tiny_teacher

# A width of 64, which the blocks of scales need.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def test_each_weight_becomes_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0
    codes, scales = quantize(weight)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (6 * 64,), (12,))
    levels = torch.tensor(NF4) * scales.view(6, 2, 1, 1)
    distance = (weight.view(6, 2, 64, 1) - levels).abs()
    expected = levels.expand_as(distance).gather(-1, distance.argmin(-1, keepdim=True)).view(6, 128)
    torch.testing.assert_close(dequantize(codes, scales, weight.shape, torch.float32), expected)


def test_a_width_that_blocks_do_not_divide_is_refused_or_left_alone() -> None:
    with pytest.raises(ValueError, match="multiple of 64, got"):
        quantize(torch.zeros(4, 72))
    module = nn.Sequential(nn.Linear(72, 4), nn.Sequential(nn.Linear(64, 4)))
    quantize_projections(module)
    assert type(module[0]) is nn.Linear
    assert type(module[1][0]) is QuantizedLinear


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(bias: bool) -> None:
    linear = nn.Linear(64, 32, bias=bias)
    quantized = QuantizedLinear(linear)
    rounded = dequantize(quantized.weight, quantized.scales, linear.weight.shape, torch.float32)
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = quantized(x)
    torch.testing.assert_close(y, nn.functional.linear(x, rounded, linear.bias))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y.detach() @ rounded)


def test_lora_on_a_quantized_base_learns_like_on_the_whole_one_with_an_eighth_of_its_bytes(tmp_path: Path) -> None:
    teacher = tiny_teacher(**WIDE)
    teacher.save_pretrained(tmp_path / "teacher")
    config = AutoConfig.from_pretrained(tmp_path / "teacher")
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    quantized = load_student(tmp_path / "teacher", config, SETTINGS, quantized=True, **cpu)
    whole = linearize(teacher, SETTINGS)
    params = FinetuneParams(lr=1e-2, batch_size=4, epochs=10, eval_every=10, checkpoint_every=50)
    rows, gains = FakeRows(8), []
    for name, student in (("whole", whole), ("quantized", quantized)):
        _, result = low_rank_finetune(student, rows, rows, params, scratch=tmp_path / name)
        gains.append(result.history[0]["validation_loss"] - result.best_loss)
    assert gains[1] == pytest.approx(gains[0], rel=0.1)
    layers = [student.base_model.layers[0].mlp for student in (whole, quantized)]
    sizes = [sum(x.nbytes for x in (*layer.parameters(), *layer.buffers())) for layer in layers]
    assert sizes[1] == pytest.approx(sizes[0] * 4.5 / 32)

"""Tokens per second and peak memory of both training stages on random weights of a known model's shape.

    python -m benchmarks.stages --model meta-llama/Llama-3.1-8B --rows 1 --out stages.json

The softmax model's plain forward pass and its LoRA step under SDPA are measured beside them in the same run.
The layer's output is compared with the float64 definition at the model's head shape first; a wrong result ends the run
before anything is timed. `efficiency` is the share of the measured matrix-product rate that the stage reaches, which is
what `lolcats doctor` uses for its estimates.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import ComputeParams, DataParams, FinetuneParams, Params, TransferParams
from lolcats_core.compute.device import resolve_device
from lolcats_core.estimation.doctor import flops_per_token, matmul_rate
from lolcats_core.estimation.memory import KNOWN_MODELS, ModelShape, train_memory
from lolcats_core.model.modeling import linearize
from lolcats_core.training.attention_transfer import transfer_losses
from lolcats_core.training.low_rank_finetune import add_lora, next_token_loss
from lolcats_kernels.hybrid_attention import hybrid_attention, hybrid_attention_naive

logger = logging.getLogger(__name__)
TOLERANCE = 4e-3  # of the bf16 output's norm, kernels' numerics


def check(shape: ModelShape, window_size: int, feature_dim: int, device: torch.device) -> float:
    """Relative error of the bf16 layer against float64 on the same rounded inputs.

    Raises:
        SystemExit: it is above the tolerance.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).bfloat16()

    heads, key_heads = shape.heads // shape.key_heads * 2, 2
    q, k, v = draw(1, 333, heads, shape.head_dim), *(draw(1, 333, key_heads, shape.head_dim) for _ in range(2))
    w_q, w_k = (draw(heads, shape.head_dim, feature_dim) * shape.head_dim**-0.5 for _ in range(2))
    gamma = torch.full((heads,), 0.1, device=device)
    operands = (q, k, v, w_q, w_k, gamma)
    expected = hybrid_attention_naive(*(x.double() for x in operands), window_size=window_size)
    error = float((hybrid_attention(*operands, window_size=window_size).double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong result: relative error {error:.2e} is above {TOLERANCE:.0e}; nothing was timed")
    return error


def timed(step: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` steps after one warm-up."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return sorted(once() for _ in range(repeats))


def llama_config(shape: ModelShape) -> LlamaConfig:
    """The transformers configuration of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=131072,
    )


def build(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Random weights of the shape, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(llama_config(shape)).eval()
    finally:
        torch.set_default_dtype(before)


def prepared(model: Any, gradient_checkpointing: bool) -> Any:
    """An adapted model in training mode."""
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def main() -> None:
    """Measure and print one JSON row per stage, the same work of the softmax model beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B", choices=sorted(KNOWN_MODELS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    device = resolve_device(options.device)
    shape = KNOWN_MODELS[options.model]
    if options.layers:
        shape = ModelShape(**{**vars(shape), "layers": options.layers})
    settings = LinearizeConfig()
    params = Params(
        compute=ComputeParams(precision="bfloat16", gradient_checkpointing=options.gradient_checkpointing),
        data=DataParams(sequence_length=options.length),
        transfer=TransferParams(batch_size=options.rows),
        finetune=FinetuneParams(batch_size=options.rows),
        linearize=settings,
    )
    error = check(shape, settings.window_size, settings.feature_dim, device)
    rate = matmul_rate(device, "bfloat16")
    teacher = build(shape, torch.bfloat16, device)
    student = linearize(teacher, settings)
    batch = {"input_ids": torch.randint(0, shape.vocab, (options.rows, options.length), device=device)}

    def transfer() -> None:
        transfer_losses(student, batch, params.transfer, 1.0)

    def softmax_forward() -> None:
        with torch.no_grad():
            teacher(batch["input_ids"], logits_to_keep=1, use_cache=False)

    def low_rank(model: Any) -> Callable[[], None]:
        return lambda: next_token_loss(model, batch).backward()

    memory, flops = train_memory(params, shape), flops_per_token(params, shape)
    rows = []
    for stage in ("transfer", "softmax forward", "finetune", "softmax finetune"):
        if stage == "transfer":
            step = transfer
        elif stage == "softmax forward":
            step = softmax_forward
        elif stage == "finetune":
            student.zero_grad(set_to_none=True)
            step = low_rank(prepared(add_lora(student, params.finetune, seed=0), options.gradient_checkpointing))
        else:
            del student
            config = LoraConfig(
                r=params.finetune.lora_rank,
                lora_alpha=params.finetune.lora_alpha,
                target_modules=list(params.finetune.target_modules),
            )
            step = low_rank(prepared(get_peft_model(teacher, config), options.gradient_checkpointing))
        seconds = timed(step, device, options.repeats)
        per_second = options.rows * options.length / statistics.median(seconds)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        rows.append(
            {
                "stage": stage,
                "model": options.model,
                "layers": shape.layers,
                "rows": options.rows,
                "length": options.length,
                "gradient_checkpointing": options.gradient_checkpointing,
                "tokens_per_second": round(per_second, 1),
                "p20_p50_p80_ms": [round(1e3 * seconds[int(len(seconds) * p)], 2) for p in (0.2, 0.5, 0.8)],
                "peak_gib": round(peak / 2**30, 2),
                "estimated_gib": round(memory[stage] / 2**30, 2) if stage in memory else None,
                "efficiency": round(per_second * flops[stage] / rate, 4) if stage in flops else None,
                "matmul_tflops": round(rate / 1e12, 1),
                "relative_error": error,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
        logger.info(json.dumps(rows[-1]))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

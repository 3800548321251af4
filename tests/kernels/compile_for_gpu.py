"""Compile every kernel that the given calls launch, for a GPU that need not be there, and print what each one uses.

    python -m tests.kernels.compile_for_gpu CASE      # a name in CASES

Must run in a process without TRITON_INTERPRET. The launches are replaced by compilation, so no result is computed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lolcats_kernels.hybrid_attention import attention_transfer_loss, hybrid_attention, hybrid_decode_
from lolcats_kernels.softmax_decode import DecodeStep, softmax_decode_
from tests.kernels.operands import make

# As many as make the most pieces of a step over kept keys and values, which then takes the most memory.
SLOTS = 16384
HOPPER = GPUTarget("cuda", 90, 32)
# Llama-3-8B's heads; the largest tiles; every window and the packed shape of the map.
CASES: dict[str, dict[str, Any]] = {
    "llama3_8b": {"heads": 4, "dim": 128, "columns": 64, "window_size": 64, "dtype": torch.bfloat16},
    "kv_head": {"heads": 4, "per": "kv", "dim": 128, "columns": 64, "window_size": 64, "dtype": torch.float16},
    "largest": {"heads": 2, "dim": 256, "columns": 128, "window_size": 64, "dtype": torch.bfloat16},
    "float32": {"heads": 2, "dim": 64, "columns": 32, "window_size": 32, "dtype": torch.float32},
    "sliding": {"heads": 2, "dim": 128, "columns": 64, "window_size": 64, "window": "sliding", "dtype": torch.bfloat16},
    "none": {"heads": 2, "dim": 96, "columns": 48, "window": "none", "feature_map": "elu", "dtype": torch.bfloat16},
    "narrow": {"heads": 2, "dim": 32, "columns": 16, "window_size": 64, "dtype": torch.float16},
    "none_float32": {"heads": 2, "dim": 64, "columns": 32, "window": "none", "dtype": torch.float32},
}


class AbsentGPU:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled_kernels(call: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """Registers per thread, spilled bytes and shared memory of each kernel that `call` launches, by name."""
    driver.set_active(AbsentGPU())
    launch, found = JITFunction.run, {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.__name__} {len(found)}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        text = usage.stdout + usage.stderr
        registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        found[name] = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        call()
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
    return found


def has_gradients(options: dict[str, Any]) -> bool:
    """Whether the kernels take a case's gradients."""
    return options.get("window") != "none" or options["dtype"] == torch.float32


def every_kernel(options: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward, transfer, prefill and decode of one case, and a step of kept heads like its own."""

    def run() -> None:
        case = make(200, batch=2, **options)
        tensors, settings = case.leaves().arguments()
        with torch.set_grad_enabled(has_gradients(options)):
            y = hybrid_attention(*tensors, **settings, backend="triton")
        if has_gradients(options):
            y.sum().backward()  # type: ignore[union-attr]
        tensors, settings = case.arguments()
        if settings["window"] == "terraced":
            w_q, w_k, gamma = (x.clone().requires_grad_() for x in tensors[3:6])
            target = torch.zeros_like(tensors[0])
            attention_transfer_loss(*tensors[:3], target, w_q, w_k, gamma, **settings, backend="triton").backward()
        _, state = hybrid_attention(*tensors, **settings, return_state=True, backend="triton")  # type: ignore[misc]
        token = (x[:, :1] for x in tensors[:3])
        hybrid_decode_(*token, *tensors[3:], state, **settings, backend="triton")
        q, k, v = (x[:, :1].transpose(1, 2).contiguous() for x in tensors[:3])
        keys, values = (x.new_zeros(*x.shape[:2], SLOTS, x.shape[3]) for x in (k, v))
        first = (keys[:, :, :4].contiguous(), values[:, :, :4].contiguous(), torch.arange(8).view(2, 4))
        mask, newest = torch.ones(2, SLOTS, dtype=torch.bool), torch.tensor([300])
        step = DecodeStep(q, k, v, keys, values, newest, 0.1, settings.get("softcap"), mask, first)
        softmax_decode_(step, backend="triton")

    return run


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compiled_kernels(every_kernel(CASES[sys.argv[1]]))) + "\n")

"""Every kernel compiles for Hopper on a machine without a GPU, and fits what its multiprocessors have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_for_gpu import CASES, has_gradients

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 232_448  # bytes a program may have on sm_90
SMALLEST = 101_376  # on sm_86 and sm_89
GRADIENTS = {"query_gradient_kernel", "reverse_states_kernel", "key_gradient_kernel", "map_product_kernel"}
KERNELS = {
    "states_kernel",
    "output_kernel",
    "window_kernel",
    "state_kernel",
    "piece_kernel",
    "join_kernel",
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_kernel_compiles_for_hopper(case: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu", case]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    expected = KERNELS | (GRADIENTS if has_gradients(CASES[case]) else set())
    expected |= {"map_gradient_kernel"} if CASES[case].get("window", "terraced") == "terraced" else set()
    assert {name.split()[0] for name in usage} == expected
    for name, used in usage.items():
        assert used["shared"] <= SHARED_MEMORY, (name, used)
        assert used["registers"] <= 255, (name, used)
        # Models with kept layers decode on any GPU, whatever form their linear layers take there.
        assert used["shared"] <= SMALLEST or not name.startswith(("piece_kernel", "join_kernel")), (name, used)
    if case == "llama3_8b":
        # What runs most must not spill.
        for name in ("states_kernel 0", "output_kernel 1", "state_kernel 16", "piece_kernel 17", "join_kernel 18"):
            assert usage[name]["stack"] == 0, (name, usage[name])

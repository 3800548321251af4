"""Stage 1 by layers and stage 2 on small memory, at the shapes of large models with random weights, on one GPU.

    python -m benchmarks.scale --out scale.json                          # every case, some minutes
    python -m benchmarks.scale --cases streamed_8b --layers 2 --limit 60

Each case is a process of its own that ends after `--limit` seconds, so one that runs out of memory or time takes
nothing else with it; `--total` leaves out the last cases. First the layer is compared with its float64 definition, and
streamed stage 1 with joint stage 1, on this device; a wrong result ends the run before anything is timed.

Streamed stage 1 runs through some of the model's layers (`layers` in a row, of `of_layers`), each read from a file of
its own; the joint mode and stage 2 run the whole model, in whose depth those layers repeat. `hours` is what 20M tokens
(two epochs of ten million) take at the measured seconds per layer, `planned_…` what `lolcats plan` says of that, and
`…_over_plan` the one divided by the other. `parts` divides a streamed run's seconds per layer, and `step_ms` is one
layer's training step; in the joint mode a layer's share of one. What does not grow with the rows (reading weights, most
of validation) weighs less in a real run, which has 2 441 steps a layer.

With `--profile` each streamed case also runs one layer of 20 steps under torch's profiler, whose tables of operators by
the host's and by the device's time come to lie beside `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import (
    TOKENS,
    Case,
    Job,
    beside_plan,
    case_parser,
    held_against_plan,
    keep_logs,
    run_cases,
    workspace,
)
from benchmarks.random_weights import SHAPES, RandomRows, Repeated, write_random
from benchmarks.stages import check, llama_config
from lolcats_common.files import write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import TransferParams
from lolcats_core.compute import distributed
from lolcats_core.compute.device import resolve_device
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.stopwatch import Stopwatch
from lolcats_core.streaming.student import load_student
from lolcats_core.training.attention_transfer import attention_transfer
from lolcats_core.training.loop import total_steps
from lolcats_core.training.low_rank_finetune import add_lora, next_token_loss
from lolcats_core.training.segments import offloaded, segmented_loss
from lolcats_core.training.streamed_transfer import streamed_attention_transfer

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the maps' norm, streamed against joint in float32
# Bytes of the hidden states that stage 1 is measured with.
HIDDEN = {"joint": 2 * 2**30, "streamed": 4 * 2**30}
PROFILED, ROWS_OF_PROFILE = 20, 40  # steps; lines of each table


def check_streamed(work: Path, device: torch.device) -> float:
    """Largest relative difference of the maps of a small model trained by layers and jointly, in float32.

    Raises:
        SystemExit: it is above the tolerance.
    """
    shape, settings = SHAPES["tiny"], LinearizeConfig(window_size=16, feature_dim=16)
    write_random(shape, work / "check", device, torch.float32)
    rows, held_out = RandomRows(16, 64, shape.vocab, 0), RandomRows(4, 64, shape.vocab, 1)
    params = TransferParams(batch_size=4, epochs=2, eval_every=99, checkpoint_every=99, max_grad_norm=1e9)
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    student = load_student(work / "check", llama_config(shape), settings, **options)
    scratch = Path(tempfile.mkdtemp(dir=work))
    attention_transfer(student, rows, held_out, params, scratch=scratch / "joint")
    layers = LayerwiseModel.open(work / "check", llama_config(shape), settings=settings, **options)
    maps, *_ = streamed_attention_transfer(layers, rows, held_out, params, scratch=scratch / "streamed")
    expected = {name: p.detach().cpu() for name, p in named_map_parameters(student).items()}
    error = max(float((maps[name] - value).norm() / value.norm()) for name, value in expected.items())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong result: streamed maps differ by {error:.1e}, above {TOLERANCE:.0e}; nothing was timed")
    return error


def transfer_case(name: str, streamed: bool, buffer: str = "disk") -> Callable[[Case, argparse.Namespace], dict]:
    """Two epochs of stage 1 over as many rows as `HIDDEN` bytes hold, after a warm-up on one batch."""
    mode = "streamed" if streamed else "joint"

    def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
        model, batch, length = case.shape(name), options.batch, options.length
        row_bytes = length * model.hidden * case.dtype.itemsize
        rows = options.rows or max(batch, HIDDEN[mode] // row_bytes)
        folder, held = case.weights(name, buffer=2 * rows * row_bytes)
        shape = held if streamed else case.whole(name)
        config, params = llama_config(shape), case.params(length, batch, transfer={"buffer": buffer})
        where: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
        student = None if streamed else load_student(Repeated(folder, held.layers), config, case.settings, **where)

        def transfer(count: int, config: Any = config) -> tuple[float, Stopwatch]:
            data, held_out = RandomRows(count, length, shape.vocab, 0), RandomRows(batch, length, shape.vocab, 1)
            scratch, stopwatch = Path(tempfile.mkdtemp(dir=case.work)), Stopwatch(case.device)
            begin = case.start()
            if student is None:
                layers = LayerwiseModel.open(folder, config, settings=case.settings, **where)
                streamed_attention_transfer(
                    layers, data, held_out, params.transfer, scratch=scratch, stopwatch=stopwatch
                )
            else:
                attention_transfer(student, data, held_out, params.transfer, scratch=scratch)
            case.wait()
            elapsed = time.perf_counter() - begin
            shutil.rmtree(scratch)
            return elapsed, stopwatch

        transfer(batch)  # compiles the kernels
        elapsed, stopwatch = transfer(rows)
        peak, tokens = case.peak(), 2 * rows * length
        if streamed and options.profile:
            one = llama_config(replace(shape, layers=1))
            text = profiled(lambda: transfer(PROFILED * batch // 2, one), case.device)
            options.row.with_suffix(".profile.txt").write_text(text)
        once, per_layer, parts = 0.0, elapsed / shape.layers, {}
        if streamed:
            once = stopwatch.seconds.pop("embedding")
            # The last layer has nobody to hand its outputs to.
            passes = {"propagation": max(1, shape.layers - 1)}
            parts = {part: seconds / passes.get(part, shape.layers) for part, seconds in stopwatch.seconds.items()}
            per_layer = sum(parts.values())
        seconds = per_layer * model.layers + once
        return {
            "mode": mode,
            "layers": shape.layers,
            "of_layers": model.layers,
            "rows": rows,
            "batch": batch,
            "length": length,
            "seconds_per_layer": round(per_layer, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "hours": round(seconds * TOKENS / tokens / 3600, 2),
            "parts": {part: round(spent, 3) for part, spent in parts.items()},
            "step_ms": round(1e3 * parts.get("training", per_layer) / total_steps(rows, params.transfer), 2),
            "elapsed": round(elapsed, 1),
            "buffer": buffer if streamed else None,
            **peak,
            **beside_plan(params, shape, model, "transfer", mode),
        }

    return run


def profiled(work: Callable[[], Any], device: torch.device) -> str:
    """Tables of the operators in `work` that take most of the host's and most of the device's time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        begin = time.perf_counter()
        work()
        elapsed = time.perf_counter() - begin
    averages = profiler.key_averages()
    orders = {"host": "self_cpu_time_total", "device": "self_device_time_total"}
    tables = [
        f"by the {which}'s own time\n{averages.table(order, row_limit=ROWS_OF_PROFILE, max_name_column_width=80)}"
        for which, order in orders.items()
    ]
    return "\n".join([f"{PROFILED} steps of one layer, {elapsed:.3f} s under the profiler", *tables])


def finetune_case(
    *,
    rows: int = 1,
    length: int | None = None,
    steps: int = 3,
    quantized: bool = False,
    checkpointing: bool = False,
    offload: bool = False,
    segment: int | None = None,
) -> Callable[[Case, argparse.Namespace], dict]:
    """Optimiser steps of stage 2 at 8B after a warm-up."""

    def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
        folder, held = case.weights("8b", buffer=0)
        shape, tokens = case.whole("8b"), min(length or options.length, 256 if case.tiny else 2**20)
        begin = case.start()
        student = load_student(
            Repeated(folder, held.layers),
            llama_config(shape),
            case.settings,
            device=case.device,
            dtype=case.dtype,
            quantized=quantized,
        )
        case.wait()
        loading, loaded = time.perf_counter() - begin, case.peak()["peak_gib"]
        params = case.params(tokens, rows, checkpointing=checkpointing)
        adapted: Any = add_lora(student, params.finetune, seed=0).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.enable_input_require_grads()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batch = {"input_ids": RandomRows(rows, tokens, shape.vocab, 0).input_ids.to(case.device)}

        def step() -> None:
            if segment:
                segmented_loss(adapted, batch, min(segment, tokens // 2), 1.0)
            elif offload:
                with offloaded():
                    loss = next_token_loss(adapted, batch)
                loss.backward()
            else:
                next_token_loss(adapted, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        begin = case.start()
        for _ in range(steps):
            step()
        case.wait()
        elapsed = (time.perf_counter() - begin) / steps
        mode = ("quantized" if quantized else "whole") + (", checkpointing" if checkpointing else "")
        planned = {} if segment or offload else beside_plan(params, shape, case.shape("8b"), "finetune", mode)
        return {
            "mode": mode + (", offload" if offload else "") + (f", segments of {segment}" if segment else ""),
            "layers": shape.layers,
            "of_layers": case.shape("8b").layers,
            "rows": rows,
            "length": tokens,
            "seconds_per_step": round(elapsed, 3),
            "tokens_per_second": round(rows * tokens / elapsed, 1),
            "hours": round(TOKENS * elapsed / (rows * tokens) / 3600, 2),
            "loading_seconds": round(loading, 1),
            "loading_peak_gib": loaded,
            **case.peak(),
            **planned,
        }

    return run


# By importance: what is last is left out first.
CASES: dict[str, Callable[[Case, argparse.Namespace], dict]] = {
    "streamed_8b": transfer_case("8b", streamed=True),
    "joint_8b": transfer_case("8b", streamed=False),
    "finetune_8b_quantized_checkpointing": finetune_case(rows=8, quantized=True, checkpointing=True),
    "streamed_70b": transfer_case("70b", streamed=True),
    "streamed_405b": transfer_case("405b", streamed=True),
    "finetune_8b_65536": finetune_case(length=65536, steps=1, checkpointing=True),
    "streamed_8b_memory": transfer_case("8b", streamed=True, buffer="memory"),
    "finetune_8b": finetune_case(rows=2),
    "finetune_8b_quantized": finetune_case(rows=1, quantized=True),
    "finetune_8b_65536_segments": finetune_case(length=65536, steps=1, segment=2048),
    "finetune_8b_65536_offload": finetune_case(length=65536, steps=1, checkpointing=True, offload=True),
}


def run_case(options: argparse.Namespace) -> None:
    """Measure one case in this process and write its row."""
    case = Case(options.device, options.work, tiny=options.tiny, layers=options.layers)
    row = CASES[options.case](case, options)
    write_json(options.row, {"case": options.case, **row, **case.versions()})
    distributed.finish()


def run_checks(options: argparse.Namespace) -> dict[str, float]:
    """Relative errors of the layer and of streamed stage 1 on this device; ends the run when one is too large."""
    device = resolve_device(options.device)
    shape, features = (SHAPES["tiny"], 16) if options.tiny else (SHAPES["8b"], 64)
    return {
        "relative_error": check(shape, 64, features, device),
        "streamed_error": check_streamed(options.work, device),
    }


def main() -> None:
    """Check, then measure and print one JSON row per case."""
    parser = case_parser(__doc__, CASES, total=480.0)
    parser.add_argument("--rows", type=int, help="training rows of stage 1; what fills 4 GiB (joint: 2) by default")
    parser.add_argument("--batch", type=int, default=8, help="rows of a forward pass of stage 1")
    parser.add_argument("--profile", action="store_true", help="write profiles of streamed cases beside --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.case:
        run_case(options)
        return
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with workspace(options, "scale-"):
        errors = run_checks(options)
        logger.info(json.dumps(errors))
        jobs: list[Job] = [(name, 1, []) for name in options.cases]
        for row in run_cases("benchmarks.scale", jobs, options, ("rows", "batch", "profile"), begin):
            rows.append({**row, **held_against_plan(row), **errors})
            logger.info(json.dumps(rows[-1]))
            if options.out:
                write_json(options.out, rows)
                keep_logs(options.work, options.out.with_suffix(".log"))
                for found in options.work.glob("*.profile.txt"):
                    shutil.copy(found, options.out.with_name(f"{options.out.stem}.{found.name}"))


if __name__ == "__main__":
    main()

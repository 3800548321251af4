"""Stage 1 by layers and stage 2 on small memory, at the shapes of large models with random weights.

    python -m benchmarks.scale --out scale.json                          # every case on one GPU, some minutes
    python -m benchmarks.scale --cases streamed_8b --layers 2 --limit 60
    python -m benchmarks.scale --cases streamed_8b joint_8b finetune_8b --gpus 4    # under torchrun, with FSDP2

Each case is a process of its own that ends after `--limit` seconds, so one that runs out of memory or time takes
nothing else with it. First the layer is compared with its float64 definition, and streamed stage 1 with joint stage 1,
on this device; a wrong result ends the run before anything is timed. Weights are written layer by layer as safetensors
shards. `hours` extrapolates what a layer took to all of the model's layers and 20M tokens (two epochs of ten million).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from benchmarks.stages import check, llama_config
from lolcats_core import parallel
from lolcats_core.config import LinearizeConfig
from lolcats_core.doctor import streamed_memory, train_memory
from lolcats_core.files import write_json
from lolcats_core.finetune import add_lora, next_token_loss
from lolcats_core.known_models import KNOWN_MODELS, ModelShape
from lolcats_core.loading import load_student
from lolcats_core.modeling import empty_student, named_map_parameters
from lolcats_core.params import ComputeParams, DataParams, FinetuneParams, Params, TransferParams
from lolcats_core.runtime import resolve_device
from lolcats_core.segments import segmented_loss
from lolcats_core.streaming.transfer import streamed_attention_transfer
from lolcats_core.transfer import attention_transfer

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the maps' norm, streamed against joint in float32
TOKENS = 20_000_000
SHAPES = {
    "8b": KNOWN_MODELS["meta-llama/Llama-3.1-8B"],
    "70b": KNOWN_MODELS["meta-llama/Llama-3.1-70B"],
    "405b": KNOWN_MODELS["meta-llama/Llama-3.1-405B"],
    "tiny": ModelShape(3, 64, 128, 4, 2, 32, 256),
}
# Layers of each streamed case unless --layers says otherwise; of 70B as many as the disk holds, at most these.
LAYERS = {"8b": 4, "70b": 8, "405b": 2, "tiny": 2}


class RandomRows:
    """Random token rows that are the same in every process."""

    def __init__(self, rows: int, length: int, vocab: int, seed: int) -> None:
        self.input_ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
        self.sequence_length = length

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[torch.as_tensor(np.asarray(indices))]}


def write_random(shape: ModelShape, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, one shard in memory at a time; one that is there is kept."""
    done = folder / "config.json"
    if done.is_file() and json.loads(done.read_text())["num_hidden_layers"] == shape.layers:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = empty_student(llama_config(shape), LinearizeConfig(feature_dim=16))
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, p in model.named_parameters():
        if ".feature_maps." not in name and not name.startswith("linearized."):
            number = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "ends"
            shards.setdefault(f"model-{number}.safetensors", []).append((name, p.shape))
    generator = torch.Generator(device).manual_seed(0)
    where = {}
    for file, tensors in shards.items():
        drawn = {}
        for name, size in tensors:
            if len(size) == 1:  # norms
                drawn[name] = torch.ones(size, dtype=dtype)
            else:
                drawn[name] = (torch.randn(size, generator=generator, device=device) * size[1] ** -0.5).to(dtype).cpu()
        save_file(drawn, folder / file, metadata={"format": "pt"})
        where |= {name: file for name, _ in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    llama_config(shape).save_pretrained(folder)


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
    scratch = parallel.broadcast(Path(tempfile.mkdtemp(dir=work)))
    attention_transfer(student, rows, held_out, params, scratch=scratch / "joint")
    maps, *_ = streamed_attention_transfer(
        work / "check", llama_config(shape), settings, rows, held_out, params, scratch=scratch / "streamed", **options
    )
    expected = {name: p.detach().cpu() for name, p in named_map_parameters(student).items()}
    error = max(float((maps[name] - value).norm() / value.norm()) for name, value in expected.items())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong result: streamed maps differ by {error:.1e}, above {TOLERANCE:.0e}; nothing was timed")
    return error


class Case:
    """What one case measures with: its options, its device, and its place on the disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = parallel.start(resolve_device(options.device))
        self.work: Path = options.work
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.settings = LinearizeConfig(feature_dim=16 if options.shape else 64)

    def shape(self, name: str, whole: bool = False) -> tuple[ModelShape, ModelShape]:
        """The shape as measured, and the model's own. `--layers` and, for streamed cases, `LAYERS` cut its depth."""
        name = self.options.shape or name
        model = SHAPES[name]
        wanted = replace(model, layers=self.options.layers or (model.layers if whole else LAYERS[name]))
        if parallel.is_main():
            for other in self.work.glob("weights-*"):  # one model at a time fits on a small disk
                if other != self.folder(wanted):
                    shutil.rmtree(other)
        parallel.barrier()
        if self.folder(wanted).is_dir():
            return wanted, model
        ends = 2 * model.vocab * model.hidden * self.dtype.itemsize
        room = shutil.disk_usage(self.work).free * 0.8 - ends - self.buffer_bytes(model)
        held = int(room // (model.layer_parameters * self.dtype.itemsize))
        return replace(model, layers=max(1, min(wanted.layers, parallel.broadcast(held)))), model

    def buffer_bytes(self, shape: ModelShape) -> int:
        return 2 * self.options.rows * self.options.length * shape.hidden * self.dtype.itemsize

    def folder(self, shape: ModelShape) -> Path:
        return self.work / f"weights-{shape.hidden}-{shape.layers}"

    def weights(self, shape: ModelShape) -> Path:
        """Files of random weights."""
        if parallel.is_main():
            write_random(shape, self.folder(shape), self.device, self.dtype)
        parallel.barrier()
        return self.folder(shape)

    def params(self, **finetune: Any) -> Params:
        """Of the estimates that stand beside the measurements."""
        rows = self.options.batch
        return Params(
            compute=ComputeParams(precision="bfloat16" if self.dtype == torch.bfloat16 else "float32"),
            data=DataParams(sequence_length=self.options.length),
            transfer=TransferParams(
                batch_size=rows, epochs=2, eval_every=10**6, checkpoint_every=10**6, log_every=10**6, max_eval_rows=rows
            ),
            finetune=FinetuneParams(batch_size=rows, **finetune),
            linearize=self.settings,
        )

    def peak(self) -> float:
        """GiB allocated at most since `start`."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def start(self) -> float:
        """Reset the peak; now."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parallel.barrier()


def transfer_case(name: str, streamed: bool, buffer: str = "disk") -> Callable[[Case], dict[str, Any]]:
    """Stage 1 over `--rows` rows, two epochs, after a warm-up on one batch."""

    def run(case: Case) -> dict[str, Any]:
        shape, model = case.shape(name)
        folder, config, options = case.weights(shape), llama_config(shape), case.options
        params = case.params()
        student = None
        if not streamed:
            student = load_student(folder, config, case.settings, device=case.device, dtype=case.dtype)
        elapsed = 0.0
        for rows in (options.batch, options.rows):  # the first compiles the kernels
            data, held_out = (RandomRows(n, options.length, shape.vocab, 0) for n in (rows, options.batch))
            scratch = parallel.broadcast(Path(tempfile.mkdtemp(dir=case.work)))
            begin = case.start()
            if student is None:
                streamed_attention_transfer(
                    folder,
                    config,
                    case.settings,
                    data,
                    held_out,
                    params.transfer,
                    scratch=scratch,
                    device=case.device,
                    dtype=case.dtype,
                    on_disk=buffer == "disk",
                )
            else:
                attention_transfer(student, data, held_out, params.transfer, scratch=scratch)
            case.wait()
            elapsed = time.perf_counter() - begin
            if parallel.is_main():
                shutil.rmtree(scratch, ignore_errors=True)
        tokens = 2 * options.rows * options.length
        per_layer = elapsed / shape.layers
        estimate = streamed_memory(params, shape) if streamed else train_memory(params, shape)["transfer"]
        return {
            "mode": "streamed" if streamed else "joint",
            "layers": shape.layers,
            "of_layers": model.layers,
            "rows": options.rows,
            "seconds_per_layer": round(per_layer, 3),
            "tokens_per_second": round(tokens / (per_layer * model.layers), 1),
            "hours": round(per_layer * model.layers * TOKENS / tokens / 3600, 2),
            "peak_gib": round(case.peak(), 2),
            "estimated_gib": round(estimate / 2**30, 2),
            "buffer": buffer if streamed else None,
        }

    return run


def finetune_case(**options: Any) -> Callable[[Case], dict[str, Any]]:
    """Optimiser steps of stage 2 at 8B; `length`, `rows`, `quantized`, `checkpointing`, `offload`, `segment`."""

    def run(case: Case) -> dict[str, Any]:
        shape, model = case.shape("8b", whole=True)
        folder = case.weights(shape)
        length, rows = options.get("length") or case.options.length, options.get("rows", 1)
        if case.options.shape:
            length = min(length, 256)
        quantized, segment = options.get("quantized", False), options.get("segment")
        student = load_student(
            folder, llama_config(shape), case.settings, device=case.device, dtype=case.dtype, quantized=quantized
        )
        loaded = case.peak()
        adapted: Any = add_lora(student, FinetuneParams(), seed=0).train()
        if options.get("checkpointing"):
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.enable_input_require_grads()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batch = {"input_ids": RandomRows(rows * parallel.world(), length, shape.vocab, 0).input_ids}
        batch["input_ids"] = batch["input_ids"].chunk(parallel.world())[parallel.rank()].to(case.device)

        def step() -> None:
            if segment:
                segmented_loss(adapted, batch, min(segment, length // 2), 1.0)
            elif options.get("offload"):
                with torch.autograd.graph.save_on_cpu(pin_memory=case.device.type == "cuda"):
                    loss = next_token_loss(adapted, batch)
                loss.backward()
            else:
                next_token_loss(adapted, batch).backward()
            parallel.sum_gradients(trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        begin, steps = case.start(), options.get("steps", 3)
        for _ in range(steps):
            step()
        case.wait()
        elapsed = (time.perf_counter() - begin) / steps
        return {
            "layers": shape.layers,
            "of_layers": model.layers,
            "rows": rows,
            "length": length,
            "options": {key: value for key, value in options.items() if key not in ("length", "rows", "steps")},
            "tokens_per_second": round(rows * parallel.world() * length / elapsed, 1),
            "seconds_per_step": round(elapsed, 3),
            "peak_gib": round(case.peak(), 2),
            "loading_peak_gib": round(loaded, 2),
        }

    return run


CASES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "streamed_8b": transfer_case("8b", streamed=True),
    "streamed_8b_memory": transfer_case("8b", streamed=True, buffer="memory"),
    "joint_8b": transfer_case("8b", streamed=False),
    "finetune_8b": finetune_case(rows=1),
    "finetune_8b_quantized": finetune_case(rows=1, quantized=True),
    "finetune_8b_quantized_checkpointing": finetune_case(rows=8, quantized=True, checkpointing=True),
    "finetune_8b_65536": finetune_case(length=65536, steps=1, checkpointing=True),
    "finetune_8b_65536_offload": finetune_case(length=65536, steps=1, checkpointing=True, offload=True),
    "finetune_8b_65536_segments": finetune_case(length=65536, steps=1, segment=4096),
    "streamed_70b": transfer_case("70b", streamed=True),
    "streamed_405b": transfer_case("405b", streamed=True),
}


def run_case(options: argparse.Namespace) -> None:
    """Measure one case in this process (of several under torchrun) and write its row."""
    case = Case(options)
    row = {"case": options.case, "gpus": parallel.world(), **CASES[options.case](case)}
    row |= {
        "device": torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if parallel.is_main():
        write_json(options.row, row)
    parallel.finish()


def run_checks(options: argparse.Namespace) -> dict[str, float]:
    """Relative errors of the layer and of streamed stage 1 on this device; ends the run when one is too large."""
    device = resolve_device(options.device)
    error = check(SHAPES[options.shape or "8b"], 64, 16 if options.shape else 64, device)
    return {"relative_error": error, "streamed_error": check_streamed(options.work, device)}


def launch(name: str, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """The row of one case from a process group of its own; what went wrong instead where it did."""
    row = options.work / f"{name}.json"
    row.unlink(missing_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    command = [sys.executable, *(torchrun if options.gpus > 1 else []), "-m", "benchmarks.scale", *arguments]
    log = options.work / f"{name}.log"
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--case", name, "--row", str(row), "--work", str(options.work)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"case": name, "failed": f"not done within {options.limit} s"}
    if row.is_file():
        return {**json.loads(row.read_text()), "wall_seconds": round(time.perf_counter() - begin, 1)}
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return {"case": name, "failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]}


def main() -> None:
    """Check, then measure and print one JSON row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--shape", choices=["tiny"], help="measure this shape instead (to try the script)")
    parser.add_argument("--layers", type=int, help="layers of every case, fewer than the model has")
    parser.add_argument("--rows", type=int, default=128, help="training rows of stage 1")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="rows of a forward pass of stage 1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds per case")
    parser.add_argument("--total", type=float, default=540.0, help="seconds after which no further case is started")
    parser.add_argument("--work", type=Path, help="directory for weights and buffers; a temporary one by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.case:
        run_case(options)
        return
    begin, temporary = time.perf_counter(), options.work is None
    options.work = Path(tempfile.mkdtemp(prefix="scale-")) if temporary else options.work
    options.work.mkdir(parents=True, exist_ok=True)
    passed = ("shape", "layers", "rows", "length", "batch", "device")
    given = [(f"--{name}", getattr(options, name)) for name in passed]
    arguments = [text for flag, value in given if value is not None for text in (flag, str(value))]
    rows: list[dict[str, Any]] = []
    try:
        errors = run_checks(options)
        logger.info(json.dumps(errors))
        for name in options.cases:
            late = time.perf_counter() - begin > options.total
            row = {"case": name, "failed": "no time left"} if late else launch(name, options, arguments)
            rows.append({**row, **errors})
            logger.info(json.dumps(rows[-1]))
            if options.out:
                write_json(options.out, rows)
    finally:
        if temporary:
            shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()

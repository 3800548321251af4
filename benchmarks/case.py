"""What the benchmarks of whole runs share: a case in processes of its own, its clock, its memory and its weights."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.random_weights import SHAPES, write_random
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import ComputeParams, DataParams, FinetuneParams, Params, TransferParams
from lolcats_core.compute import distributed
from lolcats_core.compute.device import resolve_device
from lolcats_core.estimation.cost import GPUS, plan
from lolcats_core.estimation.memory import ModelShape

TOKENS = 20_000_000
# Layers on the disk: what streamed stage 1 runs through, and what a whole model is made of by repeating them.
LAYERS = {"8b": 8, "70b": 8, "405b": 2, "tiny": 2}
NEVER = 10**6
# A case's name, its processes and arguments of its own.
Job = tuple[str, int, list[str]]
NO_TIME = "no time left"


class Case:
    """A case's device, its clock and its place on the disk.

    Args:
        work: directory of weights and buffers. tiny: measure the smallest shape instead (to try a benchmark).
        layers: of every model, fewer than it has.
    """

    def __init__(self, device: str, work: Path, *, tiny: bool = False, layers: int | None = None) -> None:
        self.device = distributed.start(resolve_device(device))
        self.work, self.tiny, self.layers = work, tiny, layers
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.settings = LinearizeConfig(feature_dim=16 if tiny else 64)

    def shape(self, name: str) -> ModelShape:
        """A model's own shape."""
        return SHAPES["tiny" if self.tiny else name]

    def whole(self, name: str) -> ModelShape:
        """A model's shape, in which `layers` may cut the depth."""
        return replace(self.shape(name), layers=self.layers or self.shape(name).layers)

    def scratch(self, name: str) -> Path:
        """A directory that every process knows."""
        folder = self.work / f"scratch-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def weights(self, name: str, buffer: int, layers: int | None = None) -> tuple[Path, ModelShape]:
        """Files of random weights, and the shape with as many layers as they hold: `layers`, by default `LAYERS`, or
        what the disk leaves beside `buffer` bytes. Weights of other models are deleted."""
        shape = self.shape(name)
        folder = self.work / f"weights-{shape.hidden}"
        held = layers or self.layers or LAYERS["tiny" if self.tiny else name]
        if distributed.is_main():
            for other in self.work.glob("weights-*"):
                if other != folder:
                    shutil.rmtree(other)
            present = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            ends = 2 * shape.vocab * shape.hidden * self.dtype.itemsize
            room = present + 0.9 * shutil.disk_usage(self.work).free - ends - buffer
            held = max(1, min(held, int(room // (shape.layer_parameters * self.dtype.itemsize))))
            write_random(replace(shape, layers=held), folder, self.device, self.dtype)
        held = distributed.broadcast(held)
        return folder, replace(shape, layers=held)

    def params(self, length: int, rows: int, *, checkpointing: bool = False, **stages: dict[str, Any]) -> Params:
        """Parameters of a run that neither validates nor saves on its way; `stages`: what else its stages have."""
        quiet = {"eval_every": NEVER, "checkpoint_every": NEVER, "log_every": NEVER, "max_eval_rows": rows}
        common = {"batch_size": rows, "epochs": 2, **quiet}
        return Params(
            compute=ComputeParams(
                precision="bfloat16" if self.dtype == torch.bfloat16 else "float32",
                gradient_checkpointing=checkpointing,
            ),
            data=DataParams(sequence_length=length),
            transfer=TransferParams(**{**common, **stages.get("transfer", {})}),
            finetune=FinetuneParams(**{**common, **stages.get("finetune", {})}),
            linearize=self.settings,
        )

    def start(self) -> float:
        """Reset the peak; now."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter()

    def wait(self) -> None:
        """Until the device and every process are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        distributed.barrier()

    def peak(self) -> dict[str, float]:
        """GiB since `start` of the process that needed most: allocated, and held by torch's allocator."""
        if self.device.type != "cuda":
            return {"peak_gib": 0.0, "reserved_gib": 0.0}
        found = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        each = torch.zeros(distributed.world(), 2, dtype=torch.float64, device=self.device)
        each[distributed.rank()] = torch.tensor(found, dtype=torch.float64)
        most = (distributed.total(each).amax(0) / 2**30).tolist()
        return {"peak_gib": round(most[0], 2), "reserved_gib": round(most[1], 2)}

    def versions(self) -> dict[str, Any]:
        """Where and with what a row was measured."""
        return {
            "gpus": distributed.world(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }


def beside_plan(params: Params, shape: ModelShape, whole: ModelShape, stage: str, mode: str) -> dict[str, Any]:
    """What `lolcats plan` says of this run: GiB of the measured `shape`, hours of 20M tokens for the `whole` model.

    No hours where the device is none that it knows.
    """
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    known = next((gpu for gpu in GPUS if gpu in name), None)

    def choice(shape: ModelShape) -> Any:
        choices = plan(params, shape, TOKENS, distributed.world(), known or "h200")
        return next(c for c in choices if (c.stage, c.mode) == (stage, mode))

    hours = round(choice(whole).seconds / 3600, 2) if known else None
    return {"planned_gib": round(choice(shape).memory / 2**30, 2), "planned_hours": hours}


def held_against_plan(row: dict[str, Any]) -> dict[str, float]:
    """What was measured over what `lolcats plan` says, where a row has both."""
    pairs = {"memory_over_plan": ("peak_gib", "planned_gib"), "hours_over_plan": ("hours", "planned_hours")}
    known = {name: (row.get(found), row.get(planned)) for name, (found, planned) in pairs.items()}
    return {name: round(found / planned, 3) for name, (found, planned) in known.items() if found and planned}


def launch(module: str, name: str, arguments: list[str], *, work: Path, limit: float, gpus: int = 1) -> dict[str, Any]:
    """The row that `module --case name --work … --row …` writes, in a process group of its own that ends after `limit`
    seconds; what went wrong instead where it did."""
    row, log = work / f"{name}.json", work / f"{name}.log"
    row.unlink(missing_ok=True)
    run = distributed.torchrun(gpus) if gpus > 1 else []
    own = ["--case", name, "--row", str(row), "--work", str(work)]
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *run, "-m", module, *arguments, *own],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=distributed.threads(gpus),
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            # torchrun's processes have groups of their own, and end with it when it is told to.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return {"case": name, "gpus": gpus, "failed": f"not done within {limit:g} s"}
    seconds = round(time.perf_counter() - begin, 1)
    if process.returncode == 0 and row.is_file():
        return {**json.loads(row.read_text()), "wall_seconds": seconds}
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    said = next((line for line in reversed(lines) if "Error" in line and "ChildFailed" not in line), lines[-1])
    return {"case": name, "gpus": gpus, "failed": said.strip()[:400], "wall_seconds": seconds}


def case_parser(doc: str | None, cases: Iterable[str], *, total: float) -> argparse.ArgumentParser:
    """The command line that `run_cases` and a case's own process read.

    Args:
        total: default of `--total`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(cases), default=list(cases))
    parser.add_argument("--tiny", action="store_true", help="measure the smallest shape (to try the script)")
    parser.add_argument("--layers", type=int, help="layers of every case, fewer than the model has")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per case")
    parser.add_argument("--total", type=float, default=total, help="seconds in which the last case must have ended")
    parser.add_argument("--work", type=Path, help="directory for weights and buffers; a temporary one by default")
    for hidden, kind in (("--case", str), ("--row", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser


@contextlib.contextmanager
def workspace(options: argparse.Namespace, prefix: str) -> Iterator[None]:
    """Make the directory `options.work`, or a temporary one that is deleted when the block ends."""
    with contextlib.ExitStack() as stack:
        if options.work is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
            options.work = Path(folder)
        options.work.mkdir(parents=True, exist_ok=True)
        yield


def run_cases(
    module: str, jobs: Iterable[Job], options: argparse.Namespace, passed: Sequence[str], begin: float
) -> Iterator[dict[str, Any]]:
    """Run each job in processes of its own and yield its row; those after `--total` seconds are left out.

    Args:
        options: of `case_parser`, with a `workspace`.
        passed: options of `module` besides the parser's own that every case gets.
        begin: of `--total`, by `time.perf_counter`.
    """
    arguments: list[str] = []
    for name in ("tiny", "layers", "length", "device", *passed):
        value = getattr(options, name)
        arguments += [f"--{name}"] if value is True else [] if value in (None, False) else [f"--{name}", str(value)]
    for name, gpus, own in jobs:
        left = min(options.limit, options.total - (time.perf_counter() - begin))
        if left > 0:
            yield launch(module, name, [*arguments, *own], work=options.work, limit=left, gpus=gpus)
        else:
            yield {"case": name, "failed": NO_TIME}


def keep_logs(work: Path, to: Path) -> None:
    """One file with the end of what each case printed."""
    logs = sorted(work.glob("*.log"), key=lambda log: log.stat().st_mtime)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("".join(f"== {log.stem}\n{log.read_text(errors='replace')[-20_000:]}\n" for log in logs))

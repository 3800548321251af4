"""Both training stages on one and on several GPUs: speed, memory, equal loss curves, and checkpoints between them.

    python -m benchmarks.parallel --gpus 2 --out results          # results/parallel.json, some minutes

Cases, each in processes of its own (under torchrun where they are several):

- ``stages``: joint stage 1, stage 2 and streamed stage 1 at Llama-3.1-8B shapes, with one process and with `--gpus`.
  A step takes the same rows in both; one process takes them in as many more micro-batches, so that every forward pass
  has the same rows and what differs is the order of sums. Losses are compared at every logged step.
- ``resume``: stage 1 and 2 of a model cut to `RESUMED` layers, killed (SIGKILL) in stage 2 and continued by another
  number of processes, compared with a run that nothing disturbed.
- ``large``: stage 2 at Llama-3.1-70B shapes, its bf16 base divided, as many layers as `lolcats plan` finds room for.

Weights are random and repeat in the depth of a model (`benchmarks.random_weights`).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.case import NO_TIME, Case, Job, beside_plan, case_parser, keep_logs, run_cases, workspace
from benchmarks.random_weights import RandomRows, Repeated
from benchmarks.stages import llama_config
from lolcats_common.files import write_json
from lolcats_common.params import Params
from lolcats_core.compute import distributed
from lolcats_core.estimation.memory import FITS, device_memory
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import load_student
from lolcats_core.training.attention_transfer import attention_transfer
from lolcats_core.training.loop import TrainResult
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.streamed_transfer import streamed_attention_transfer

logger = logging.getLogger(__name__)
# Relative difference of losses that one and several processes may have: sums in another order, in bf16.
TOLERANCE = 1e-3
STEPS, STREAMED_STEPS, DIES_AT, CHECKPOINTS, RESUMED = 8, 32, 5, 2, 2


def curve(result: TrainResult) -> list[list[float]]:
    """Step and loss of every logged training step."""
    return [[entry["step"], entry["train_loss"]] for entry in result.history if "train_loss" in entry]


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """Largest relative difference of two curves with the same steps.

    Raises:
        ValueError: the steps differ.
    """
    if [step for step, _ in found] != [step for step, _ in expected]:
        raise ValueError(f"curves of different steps: {found} and {expected}")
    return max(abs(mine / theirs - 1) for (_, mine), (_, theirs) in zip(found, expected, strict=True))


def speed(result: TrainResult) -> float:
    """Tokens per second, the median over the steps after the first two."""
    found = [entry["tokens_per_second"] for entry in result.history if "tokens_per_second" in entry]
    return round(statistics.median(found[2:] or found), 1)


def settings_of(case: Case, options: argparse.Namespace, **changes: Any) -> Params:
    """Parameters of steps of `--micro` rows times `--gpus`, in micro-batches of `--micro` rows for each process."""
    passes = options.gpus // distributed.world()
    steps = {"gradient_accumulation": passes, "epochs": 1, "log_every": 1, **changes}
    return case.params(options.length, options.micro * distributed.world(), transfer=steps, finetune=steps)


def rows_of(case: Case, options: argparse.Namespace, steps: int) -> tuple[RandomRows, RandomRows]:
    """Training rows of so many steps, and as many held-out ones as a step has."""
    vocab, per_step = case.shape("8b").vocab, options.micro * options.gpus
    return RandomRows(steps * per_step, options.length, vocab, 0), RandomRows(per_step, options.length, vocab, 1)


def whole_model(case: Case, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Joint stage 1, then stage 2 of the same student."""
    rows, held_out = rows_of(case, options, STEPS)
    folder, held = case.weights("8b", 0)
    params, shape, scratch = settings_of(case, options), case.whole("8b"), case.scratch(f"whole-{distributed.world()}")
    student = load_student(
        Repeated(folder, held.layers), llama_config(shape), case.settings, device=case.device, dtype=case.dtype
    )
    several = distributed.world() > 1

    def measured(stage: str, mode: str, run: Callable[[], TrainResult]) -> dict[str, Any]:
        case.start()
        result = run()
        planned = beside_plan(params, shape, case.shape("8b"), stage, mode)
        speeds = {"layers": shape.layers, "tokens_per_second": speed(result)}
        return {"mode": mode, **speeds, **case.peak(), **planned, "curve": curve(result)}

    def joint() -> TrainResult:
        return attention_transfer(student, rows, held_out, params.transfer, scratch=scratch / "joint")

    def finetune() -> TrainResult:
        return low_rank_finetune(student, rows, held_out, params.finetune, scratch=scratch / "finetune")[1]

    return {
        "joint": measured("transfer", "joint, divided" if several else "joint", joint),
        "finetune": measured("finetune", "divided" if several else "whole", finetune),
    }


def layer_by_layer(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Two epochs of streamed stage 1 after a warm-up on one step."""
    rows, held_out = rows_of(case, options, STREAMED_STEPS)
    model = case.shape("8b")
    folder, held = case.weights("8b", 2 * len(rows) * options.length * model.hidden * case.dtype.itemsize)
    params = settings_of(case, options, epochs=2, log_every=STREAMED_STEPS // 4)
    begin, result = 0.0, TrainResult()
    for number, data in enumerate((held_out, rows)):
        begin = case.start()
        _, result, _ = streamed_attention_transfer(
            LayerwiseModel.open(
                folder, llama_config(held), settings=case.settings, device=case.device, dtype=case.dtype
            ),
            data,
            held_out,
            params.transfer,
            scratch=case.scratch(f"streamed-{distributed.world()}-{number}"),
        )
        case.wait()
    per_layer = (time.perf_counter() - begin) / held.layers
    return {
        "mode": "streamed",
        "layers": held.layers,
        "tokens_per_second": round(2 * len(rows) * options.length / (per_layer * model.layers), 1),
        **case.peak(),
        **beside_plan(params, held, model, "transfer", "streamed"),
        "curve": curve(result),
    }


def stages(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Joint stage 1, stage 2 and streamed stage 1."""
    found = whole_model(case, options)
    gc.collect()  # a divided model holds on to itself
    found["streamed"] = layer_by_layer(case, options)
    return {"rows_per_step": options.micro * options.gpus, "of_layers": case.shape("8b").layers, "stages": found}


def resume(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Both stages of a short model in `--scratch`; with `--dies`, rank 0 kills itself in stage 2."""
    rows, held_out = rows_of(case, options, STEPS)
    folder, held = case.weights("8b", 0)
    shape = replace(held, layers=min(RESUMED, held.layers))
    # The same parameters whatever the number of processes, as a run that continues has them.
    steps = {"epochs": 1, "log_every": 1, "checkpoint_every": CHECKPOINTS}
    params = case.params(options.length, options.micro * options.gpus, transfer=steps, finetune=steps)
    scratch = case.scratch(options.scratch)
    student = load_student(
        Repeated(folder, held.layers), llama_config(shape), case.settings, device=case.device, dtype=case.dtype
    )

    def log(metrics: dict[str, float], step: int) -> None:
        if options.dies and step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    joint = attention_transfer(student, rows, held_out, params.transfer, scratch=scratch / "joint")
    _, tuned = low_rank_finetune(student, rows, held_out, params.finetune, scratch=scratch / "finetune", log=log)
    return {"layers": shape.layers, "curves": {"transfer": curve(joint), "finetune": curve(tuned)}}


def large(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of stage 2 at 70B with gradient checkpointing, the base divided."""
    folder, held = case.weights("70b", 0, layers=1)
    whole, world = case.whole("70b"), distributed.world()
    params = case.params(
        options.length, world, checkpointing=True, finetune={"epochs": 1, "log_every": 1, "max_steps": 4}
    )
    mode = ("divided" if world > 1 else "whole") + ", checkpointing"
    room = FITS * device_memory(case.device) / 2**30 - 4  # of which the driver and the allocator take some
    layers = whole.layers
    while (
        layers > 1 and beside_plan(params, replace(whole, layers=layers), whole, "finetune", mode)["planned_gib"] > room
    ):
        layers -= 1
    shape = replace(whole, layers=layers)
    data = [RandomRows(n * world, options.length, shape.vocab, seed) for seed, n in enumerate((4, 1))]
    begin = case.start()
    student = load_student(
        Repeated(folder, held.layers), llama_config(shape), case.settings, device=case.device, dtype=case.dtype
    )
    case.wait()
    loading = time.perf_counter() - begin
    case.start()
    _, result = low_rank_finetune(
        student, data[0], data[1], params.finetune, scratch=case.scratch("large"), gradient_checkpointing=True
    )
    return {
        "mode": mode,
        "layers": layers,
        "of_layers": case.shape("70b").layers,
        "rows": world,
        "length": options.length,
        "tokens_per_second": speed(result),
        "loading_seconds": round(loading, 1),
        "curve": curve(result),
        **case.peak(),
        **beside_plan(params, shape, case.shape("70b"), "finetune", mode),
    }


CASES = {"stages": stages, "resume": resume, "large": large}


def run_case(options: argparse.Namespace) -> None:
    """Measure one case in this process (of several under torchrun); rank 0 writes its row."""
    case = Case(options.device, options.work, tiny=options.tiny, layers=options.layers)
    row = {**CASES[options.case.partition("-")[0]](case, options), **case.versions()}
    if distributed.is_main():
        write_json(options.row, {"case": options.case, **row})
    distributed.finish()


def judged(name: str, found: Any, expected: Any, **facts: Any) -> dict[str, Any]:
    """The largest difference of two curves and whether it is within `TOLERANCE`."""
    error = difference(found, expected)
    return {"comparison": name, "difference": error, "tolerance": TOLERANCE, "equal": error <= TOLERANCE, **facts}


def compared(rows: dict[str, dict[str, Any]], gpus: int) -> list[dict[str, Any]]:
    """What the finished cases say of each other: equal curves, scaling, and continued runs."""
    found = []
    one, several = rows.get("stages-1", {}), rows.get(f"stages-{gpus}", {})
    for name, alone in one.get("stages", {}).items():
        together = several.get("stages", {}).get(name)
        if together is not None:
            gain = round(together["tokens_per_second"] / alone["tokens_per_second"], 3)
            scaling = {"speedup": gain, "efficiency": round(gain / gpus, 3)}
            found.append(judged(name, together["curve"], alone["curve"], **scaling))
    whole = rows.get("resume-undisturbed", {}).get("curves", {})
    for name, row in rows.items():
        if name.startswith("resume-continued") and "curves" in row:
            found += [judged(f"{name}, {stage}", row["curves"][stage], whole[stage]) for stage in whole]
    return found


def jobs(gpus: int) -> list[Job]:
    """Every case in its order."""
    continued: list[Job] = [
        (f"resume-{word}{first}by{then}", count, ["--scratch", f"by{first}", *dies])
        for first, then in ((gpus, 1), (1, gpus))
        for word, count, dies in (("killed", first, ["--dies"]), ("continued", then, []))
    ]
    undisturbed: Job = ("resume-undisturbed", 1, ["--scratch", "undisturbed"])
    return [("stages-1", 1, []), (f"stages-{gpus}", gpus, []), undisturbed, *continued, (f"large-{gpus}", gpus, [])]


def main() -> None:
    """Run every case and print its row, then the comparisons."""
    parser = case_parser(__doc__, CASES, total=300.0)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--micro", type=int, default=4, help="rows of each process in a forward pass")
    parser.add_argument(
        "--out", type=Path, default=Path("parallel"), help="directory of parallel.json and parallel.log"
    )
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--dies", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.case:
        run_case(options)
        return
    chosen = [job for job in jobs(options.gpus) if job[0].partition("-")[0] in options.cases]
    rows: dict[str, dict[str, Any]] = {}
    begin = time.perf_counter()
    with workspace(options, "parallel-"):
        try:
            results = run_cases("benchmarks.parallel", chosen, options, ("gpus", "micro"), begin)
            for (name, gpus, own), row in zip(chosen, results, strict=True):
                dies = "--dies" in own and row.get("failed") != NO_TIME
                rows[name] = {"case": name, "gpus": gpus, "killed": "failed" in row} if dies else row
                logger.info(json.dumps(rows[name]))
                comparisons = compared(rows, options.gpus)
                write_json(options.out / "parallel.json", {"rows": list(rows.values()), "comparisons": comparisons})
            for comparison in compared(rows, options.gpus):
                logger.info(json.dumps(comparison))
        finally:
            keep_logs(options.work, options.out / "parallel.log")


if __name__ == "__main__":
    main()

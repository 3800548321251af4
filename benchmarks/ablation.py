"""The ablation of a teacher of `benchmarks.teacher`, from a bare checkout; on a GPU in bfloat16.

    python -m benchmarks.ablation --from /tmp/82m --out reports

The same command started several times, on one GPU or with another CUDA_VISIBLE_DEVICES each, shares the rows out, and
each copy writes the same report when all are done. A killed one continues. Kernels are compiled once per setting, so
several processes are faster than one also on a single GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import ComputeParams, FinetuneParams, Params, TeacherParams, TransferParams
from lolcats_core.compute.device import resolve_device
from lolcats_core.experiments import ablation
from lolcats_core.experiments.ablation import Budget
from lolcats_core.experiments.ablation_report import report_on, write_report
from lolcats_core.experiments.study import StudyContext
from lolcats_core.teacher.pin import resolve_teacher, write_pin

logger = logging.getLogger(__name__)


def ablate(folder: Path, params: Params, budget: Budget, sections: tuple[str, ...]) -> dict[str, Any]:
    """The report of the ablation of folder/teacher on folder/train and folder/validation."""
    ablation.check_sections(sections)
    pin = resolve_teacher(params.teacher, folder)
    work = folder / "ablation"
    work.mkdir(exist_ok=True)
    with FileLock(work / "pin.lock"):
        write_pin(pin, folder, work / "pin")
    study = StudyContext.open(work / "pin", folder, params, budget.evaluation(params.seed), work)
    rows = ablation.run(study, params, budget, sections)
    return report_on(study, params, budget, f"{folder.name}/{params.teacher.source}", rows)


def main(argv: list[str] | None = None) -> int:
    """Run the rows that are missing and write the report; 1 after an error's one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, required=True, metavar="DIR", help="of benchmarks.teacher")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="receives ablation.{json,md}")
    parser.add_argument("--sections", nargs="+", default=ablation.SECTIONS, metavar="SECTION")
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--recall-gap", type=int, default=200)
    parser.add_argument("--recall-samples", type=int, default=16)
    parser.add_argument("--transfer-lr", type=float, default=1e-2)
    parser.add_argument("--finetune-lr", type=float, default=1e-3)
    parser.add_argument("--feature-dim", type=int, default=64)
    parser.add_argument("--window-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    started = time.monotonic()
    try:
        cuda = resolve_device(options.device).type == "cuda"
        params = Params(
            compute=ComputeParams(device=options.device, precision="bfloat16" if cuda else "float32"),
            teacher=TeacherParams(source="teacher"),
            linearize=LinearizeConfig(window_size=options.window_size, feature_dim=options.feature_dim),
            transfer=TransferParams(lr=options.transfer_lr),
            finetune=FinetuneParams(lr=options.finetune_lr),
        )
        sizes = {field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)}
        report = ablate(options.folder, params, Budget(**sizes), tuple(options.sections))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(write_report(report, options.out))
    logger.info("%d rows, %.0f s in this process", len(report["rows"]), time.monotonic() - started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A stage that counts to eight, `pause.txt` seconds a step: what the stages of `tests.conftest.make_fake_project` run.

The file is copied into each fake project, whose dvc.yaml lists it, so a test may change it there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lolcats_common.errors import UserError
from tasks.runner.stage import Stage, main

MEASURED = {"value": 0.5, "stderr": 0.1}


def run(stage: Stage) -> Mapping[str, float]:
    """Continue to count where a killed process stopped, and write what the real stage of this name would."""
    if stage.params.seed == 13:
        raise UserError("`seed` 13 brings bad luck; take another")
    step_file = stage.scratch / "step.txt"
    started_at = step = int(step_file.read_text()) if step_file.exists() else 0
    while step < 8:
        step += 1
        stage.log_metrics({"loss": 1.0 / step}, step)
        step_file.write_text(str(step))
        print(f"{stage.name} step {step}", flush=True)
        pause(f"{stage.name} {step}")
    write_outputs(stage)
    return {"tokens": 100, "trainable_parameters": 1, "total_parameters": 50, "started_at": started_at}


def pause(step: str) -> None:
    """Wait as long as pause.txt says, and at `step` while the file that it names lists it (`tests.conftest.hold`)."""
    seconds, _, held = Path("pause.txt").read_text().partition(" ")
    time.sleep(float(seconds))
    while held and step in Path(held).read_text().splitlines():
        time.sleep(0.05)


def write_outputs(stage: Stage) -> None:
    """result.txt and, by the stage's name, a teacher, a model or an evaluation."""
    quality = Path("outputs/inputs/data.txt")
    perplexity = float(quality.read_text()) if quality.exists() else 12.0
    lr = stage.params.finetune.lr
    (stage.out / "result.txt").write_text(f"{stage.name} {lr if stage.name == 'finetune' else ''}")
    if stage.name == "teacher":
        (stage.out / "teacher.json").write_text(json.dumps({"source": "fake", "revision": "r1"}))
    if stage.name == "finetune":
        (stage.out / "model").mkdir()
        (stage.out / "model" / "config.json").write_text(json.dumps({"lr": lr}))
        if quality.exists():
            (stage.out / "model" / "weights.txt").write_text(str(perplexity))
    if stage.name == "evaluate":
        steps = {"teacher": 10.0, "swapped": 100.0, "transferred": 20.0, "finetuned": perplexity, "bigram": 400.0}
        both = {"teacher": MEASURED, "finetuned": MEASURED}
        evaluation = {
            "perplexity": steps,
            "recall": {model: {"128": MEASURED} for model in both},
            "tasks": {"code_continuation": {"metric": "acc", **both, "items": 8}},
            "lm_eval_version": "0",
            "task_hashes": {},
        }
        (stage.out / "evaluation.json").write_text(json.dumps(evaluation))


if __name__ == "__main__":
    main(sys.argv.pop(1), run)

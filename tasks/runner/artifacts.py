"""What both training stages read and write alike."""

from __future__ import annotations

import json
from pathlib import Path

from lolcats_common.errors import UserError
from lolcats_common.files import write_text
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.training.loop import TrainResult
from tasks.runner.stage import Stage

MAPS = "feature_maps.safetensors"


def selected(stage: Stage) -> tuple[LinearizeConfig, Path]:
    """The student's settings and the file of its feature maps, as stage `select` left them to every later stage.

    Raises:
        UserError: they are missing or damaged.
    """
    folder = stage.input("select")
    path = folder / "selection.json"
    try:
        settings = LinearizeConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["linearize"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `dvc repro select`") from None
    return settings, folder / MAPS


def write_history(path: Path, result: TrainResult) -> None:
    """One JSON object per logged step and per evaluation; also what `dvc plots` draws."""
    write_text(path, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in result.history))


def training_metrics(result: TrainResult, trainable: int, total: int) -> dict[str, float]:
    """The numbers that the summary shows for a training stage."""
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "train_seconds": result.seconds,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        "best_step": result.best_step,
        "best_validation_loss": result.best_loss if result.steps else 0.0,
        "trainable_parameters": trainable,
        "total_parameters": total,
    }

"""Stage `transfer`: the teacher gets feature maps, and they learn to copy its softmax attention."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("transfer", parallel=True, preflight=True)  # before the imports below, which take seconds

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lolcats_common.files import write_json
from lolcats_common.params import TransferParams
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.data.rows import open_split
from lolcats_core.estimation.memory import ModelShape, choose_transfer_mode
from lolcats_core.model.map_files import write_feature_maps
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import Student, causal_model, open_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.attention_transfer import Errors, attention_transfer, head_errors
from lolcats_core.training.loop import Rows, TrainResult
from lolcats_core.training.streamed_transfer import streamed_attention_transfer
from tasks.reporting.figures import layer_figure, loss_figure
from tasks.runner.artifacts import MAPS, training_metrics, write_history
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write feature_maps.safetensors, linearize.json, errors.json and history.jsonl; metrics of the training."""
    params, teacher = stage.params, Teacher.open(stage.input("teacher"))
    device, (train_rows, validation_rows) = stage.device(), open_split(stage.input("prepare"))
    streamed = choose_transfer_mode(params, ModelShape.from_config(teacher.config), device) == "streamed"
    student = open_student(
        teacher,
        params.linearize,
        device=device,
        dtype=resolve_dtype(params.compute.precision),
        seed=params.seed,
        by_layer=streamed,
    )
    maps, result, errors = train_maps(
        student,
        train_rows,
        validation_rows,
        params.transfer,
        scratch=stage.scratch,
        seed=params.seed,
        log=stage.log_metrics,
    )
    if result.steps:
        stage.log_figure("transfer_loss.png", loss_figure(result.history, "Attention transfer", log_scale=True))
        stage.log_figure("transfer_layers.png", layer_figure(result.history, "Attention transfer: error by layer"))
    write_feature_maps(maps, params.linearize, stage.out / MAPS)
    write_json(stage.out / "linearize.json", {"linearize": params.linearize.to_dict(), "seed": params.seed})
    write_json(stage.out / "errors.json", errors)
    write_history(stage.out / "history.jsonl", result)
    trainable = sum(tensor.numel() for tensor in maps.values())
    total = sum(parameter.numel() for parameter in causal_model(student).parameters())
    return {**training_metrics(result, trainable, total), "streamed": float(streamed)}


def train_maps(
    student: Student,
    rows: Rows,
    validation: Rows,
    params: TransferParams,
    *,
    scratch: Path,
    seed: int = 0,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> tuple[dict[str, Tensor], TrainResult, Errors]:
    """Train a student's feature maps, with all its layers at once or one after the other, and measure their errors.

    Args:
        student: of `open_student`. One in memory is trained in place, one by layers is closed at the end.
        params: with `enabled` false the maps of a student in memory stay as they are.
        scratch, seed, log: as in `attention_transfer`.

    Returns:
        The feature maps by their names in the student, what the training did, and every linearized head's error.

    Raises:
        UserError: as `attention_transfer` and `streamed_attention_transfer`.
    """
    trained, result = named_map_parameters(causal_model(student)), TrainResult()
    if not trained:
        return {}, result, {}
    if isinstance(student, LayerwiseModel):
        maps, result, errors = streamed_attention_transfer(
            student, rows, validation, params, scratch=scratch, seed=seed, log=log
        )
        # A layer knows only its own error while it trains; the losses over all of them come together here.
        for entry in result.history:
            log({name: value for name, value in entry.items() if name.endswith("_loss")}, int(entry["step"]))
        return maps, result, errors
    if params.enabled:
        result = attention_transfer(student, rows, validation, params, scratch=scratch, seed=seed, log=log)
    count = min(len(validation), params.max_eval_rows or len(validation))
    return dict(trained), result, head_errors(student, validation, count, params.batch_size)

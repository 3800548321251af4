"""Stage `transfer`: the teacher gets feature maps, and they learn to copy its softmax attention."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("transfer", parallel=True, preflight=True)  # before the imports below, which take seconds

from collections.abc import Mapping

from lolcats_common.files import write_json
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.estimation.memory import choose_transfer_mode
from lolcats_core.estimation.shapes import ModelShape
from lolcats_core.model.map_files import write_feature_maps
from lolcats_core.streaming.student import causal_model, open_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.transfer import transfer
from tasks.reporting.figures import layer_figure, loss_figure
from tasks.runner.artifacts import MAPS, open_rows, training_metrics, write_history
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write feature_maps.safetensors, linearize.json, errors.json and history.jsonl; metrics of the training."""
    params, teacher = stage.params, Teacher.open(stage.input("teacher"))
    device, (train_rows, validation_rows) = stage.device(), open_rows(stage)
    streamed = choose_transfer_mode(params, ModelShape.from_config(teacher.config), device) == "streamed"
    student = open_student(
        teacher,
        params.linearize,
        device=device,
        dtype=resolve_dtype(params.compute.precision),
        seed=params.seed,
        by_layer=streamed,
    )
    maps, result, errors = transfer(
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

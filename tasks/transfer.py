"""Stage `transfer`: the teacher gets feature maps, and they learn to copy its softmax attention."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("transfer", parallel=True)  # before the imports below, which take seconds

from collections.abc import Mapping

import torch
from transformers import AutoConfig

from lolcats_common.files import write_json
from lolcats_core import attention_transfer, linearize
from lolcats_core.compute import distributed
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.model.modeling import empty_student, named_map_parameters, write_feature_maps
from lolcats_core.streaming.load_student import load_student
from lolcats_core.teacher.pin import load_teacher, locate, read_pin, verified_folder
from lolcats_core.training.attention_transfer import head_errors
from lolcats_core.training.loop import TrainResult
from lolcats_core.training.streamed_transfer import streamed_attention_transfer
from tasks.reporting.figures import layer_figure, loss_figure
from tasks.runner import preflight
from tasks.runner.artifacts import MAPS, open_rows, training_metrics, write_history
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write feature_maps.safetensors, linearize.json, errors.json and history.jsonl; metrics of the training."""
    params = stage.params
    preflight.check(params, stage.input("teacher"), stage.root)
    device, dtype = stage.device(), resolve_dtype(params.compute.precision)
    train_rows, validation_rows = open_rows(stage)
    pin = read_pin(stage.input("teacher"))
    config = AutoConfig.from_pretrained(locate(pin, stage.root), trust_remote_code=pin.trust_remote_code)
    with torch.device("meta"):
        shape = empty_student(config, params.linearize)
    trains = params.transfer.enabled and bool(named_map_parameters(shape))
    result, streamed = TrainResult(), False
    if trains and preflight.transfer_mode(params, config, device) == "streamed":
        streamed = True
        maps, result, errors = streamed_attention_transfer(
            verified_folder(stage.input("teacher")),
            config,
            params.linearize,
            train_rows,
            validation_rows,
            params.transfer,
            scratch=stage.scratch,
            device=device,
            dtype=dtype,
            seed=params.seed,
            on_disk=params.transfer.buffer == "disk",
            log=stage.log_metrics,
        )
        # A layer knows only its own error while it trains; the losses over all of them come together here.
        for entry in result.history:
            stage.log_metrics({k: v for k, v in entry.items() if k.endswith("_loss")}, int(entry["step"]))
    else:
        if distributed.world() > 1:
            folder = verified_folder(stage.input("teacher"))
            student = load_student(folder, config, params.linearize, device=device, dtype=dtype, seed=params.seed)
        else:
            teacher = load_teacher(stage.input("teacher"), dtype=dtype, device=device)
            student = linearize(teacher, params.linearize, seed=params.seed)
        maps = dict(named_map_parameters(student))
        if trains:
            result = attention_transfer(
                student,
                train_rows,
                validation_rows,
                params.transfer,
                scratch=stage.scratch,
                seed=params.seed,
                log=stage.log_metrics,
            )
        count = min(len(validation_rows), params.transfer.max_eval_rows or len(validation_rows))
        errors = head_errors(student, validation_rows, count, params.transfer.batch_size) if maps else {}
    if trains:
        stage.log_figure("transfer_loss.png", loss_figure(result.history, "Attention transfer", log_scale=True))
        stage.log_figure("transfer_layers.png", layer_figure(result.history, "Attention transfer: error by layer"))
    write_feature_maps(maps, params.linearize, stage.out / MAPS)
    write_json(stage.out / "linearize.json", {"linearize": params.linearize.to_dict(), "seed": params.seed})
    write_json(stage.out / "errors.json", errors)
    write_history(stage.out / "history.jsonl", result)
    trainable = sum(p.numel() for p in named_map_parameters(shape).values())
    metrics = training_metrics(result, trainable, sum(p.numel() for p in shape.parameters()))
    metrics["streamed"] = float(streamed)
    return metrics if result.steps else metrics | {"best_validation_loss": 0.0}

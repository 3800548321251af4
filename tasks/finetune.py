"""Stage `finetune`: LoRA repairs the linearized model; the merged model is what gets evaluated and registered."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("finetune", parallel=True)  # before the imports below, which take seconds

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from lolcats_core import linearize, load_feature_maps, low_rank_finetune, save_delta
from lolcats_core.compute import distributed
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.export.merging import base_fingerprint, save_merged
from lolcats_core.streaming.load_student import load_student
from lolcats_core.streaming.weights import WeightFiles
from lolcats_core.teacher.pin import load_teacher, load_tokenizer, read_pin, verified_folder
from lolcats_core.training.low_rank_finetune import check_target_modules
from tasks.reporting.figures import loss_figure
from tasks.runner.artifacts import open_rows, selected, training_metrics, write_history
from tasks.runner.stage import Stage

if TYPE_CHECKING:
    from peft import PeftModel


def run(stage: Stage) -> Mapping[str, float]:
    """Write model/ (merged, with tokenizer), adapter/ (the delta) and history.jsonl; metrics of the training."""
    params = stage.params
    device, dtype = stage.device(), resolve_dtype(params.compute.precision)
    train_rows, validation_rows = open_rows(stage)
    settings, maps = selected(stage)
    pin = read_pin(stage.input("teacher"))
    # A base that is quantized or divided between processes is read layer by layer, and its files serve the merge.
    by_layer = params.finetune.quantize_base or distributed.world() > 1
    if by_layer:
        folder = verified_folder(stage.input("teacher"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=pin.trust_remote_code)
        quantized = params.finetune.quantize_base
        student = load_student(folder, config, settings, device=device, dtype=dtype, quantized=quantized)
    else:
        teacher = load_teacher(stage.input("teacher"), dtype=dtype, device=device)
        student = linearize(teacher, settings, seed=params.seed)
    load_feature_maps(student, maps)
    check_target_modules(student, params.finetune)
    total = sum(p.numel() for p in student.parameters())
    adapted, result = low_rank_finetune(
        student,
        train_rows,
        validation_rows,
        params.finetune,
        scratch=stage.scratch,
        seed=params.seed,
        gradient_checkpointing=params.compute.gradient_checkpointing,
        offload_activations=params.compute.offload_activations,
        log=stage.log_metrics,
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    stage.log_figure("finetune_loss.png", loss_figure(result.history, "Low-rank finetuning"))
    write_history(stage.out / "history.jsonl", result)
    if by_layer:
        _write_from_files(stage, adapted, WeightFiles(folder), dtype)
    else:
        save_delta(adapted, stage.out / "adapter", pin)
        cast(PreTrainedModel, adapted.merge_and_unload()).save_pretrained(stage.out / "model")
    load_tokenizer(stage.input("teacher")).save_pretrained(stage.out / "model")
    return training_metrics(result, trainable, total)


def _write_from_files(stage: Stage, adapted: PeftModel, files: WeightFiles, dtype: torch.dtype) -> None:
    """adapter/ and model/ where the base in memory is not the teacher's own."""
    if distributed.is_main():
        weights = base_fingerprint(adapted.get_base_model(), files, dtype)
        save_delta(adapted, stage.out / "adapter", read_pin(stage.input("teacher")), weights)
        save_merged(adapted, files, dtype, stage.out / "model")
    files.close()
    distributed.barrier()

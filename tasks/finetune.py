"""Stage `finetune`: LoRA repairs the linearized model; the merged model is what gets evaluated and registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from transformers import PreTrainedModel

from lolcats_core import linearize, load_feature_maps, low_rank_finetune, save_delta
from lolcats_core.finetune import check_target_modules
from lolcats_core.runtime import resolve_device, resolve_dtype
from lolcats_core.teacher import load_teacher, load_tokenizer, read_pin
from tasks.figures import loss_figure
from tasks.stage import Stage, main
from tasks.training_outputs import open_rows, training_metrics, write_history


def run(stage: Stage) -> Mapping[str, float]:
    """Write model/ (merged, with tokenizer), adapter/ (the delta) and history.jsonl; metrics of the training."""
    params = stage.params
    device, dtype = resolve_device(params.compute.device), resolve_dtype(params.compute.precision)
    train_rows, validation_rows = open_rows(stage)
    teacher = load_teacher(stage.input("teacher"), dtype=dtype, device=device)
    student = linearize(teacher, params.linearize, seed=params.seed)
    check_target_modules(student, params.finetune)
    load_feature_maps(student, stage.input("transfer") / "feature_maps.safetensors")
    total = sum(p.numel() for p in student.parameters())
    adapted, result = low_rank_finetune(
        student,
        train_rows,
        validation_rows,
        params.finetune,
        scratch=stage.scratch,
        seed=params.seed,
        gradient_checkpointing=params.compute.gradient_checkpointing,
        log=stage.log_metrics,
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    stage.log_figure("finetune_loss.png", loss_figure(result.history, "Low-rank finetuning"))
    write_history(stage.out / "history.jsonl", result)
    save_delta(adapted, stage.out / "adapter", read_pin(stage.input("teacher")))
    merged = cast(PreTrainedModel, adapted.merge_and_unload())
    merged.save_pretrained(stage.out / "model")
    load_tokenizer(stage.input("teacher")).save_pretrained(stage.out / "model")
    return training_metrics(result, trainable, total)


if __name__ == "__main__":
    main(run)

"""Stage `finetune`: LoRA repairs the linearized model; the merged model is what gets evaluated and registered."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("finetune", parallel=True, preflight=True)  # before the imports below, which take seconds

from collections.abc import Mapping

from lolcats_core import low_rank_finetune
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.data.rows import open_split
from lolcats_core.export.merging import save_student
from lolcats_core.streaming.student import causal_model, open_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.low_rank_finetune import check_target_modules
from tasks.reporting.figures import loss_figure
from tasks.runner.artifacts import selected, training_metrics, write_history
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write model/ (merged, with tokenizer), adapter/ (the delta) and history.jsonl; metrics of the training."""
    params, teacher = stage.params, Teacher.open(stage.input("teacher"))
    device, dtype = stage.device(), resolve_dtype(params.compute.precision)
    train_rows, validation_rows = open_split(stage.input("prepare"))
    settings, maps = selected(stage)
    quantized = params.finetune.quantize_base
    student = causal_model(
        open_student(teacher, settings, device=device, dtype=dtype, seed=params.seed, maps=maps, quantized=quantized)
    )
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
    save_student(adapted, teacher, dtype, stage.out)
    teacher.tokenizer().save_pretrained(stage.out / "model")
    return training_metrics(result, trainable, total)

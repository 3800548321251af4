"""Stage 2, low-rank linearizing: LoRA on the projections repairs what attention transfer left (arXiv 2410.10254, 3.3).

# B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams
from lolcats_core.model.branches import window_dropout
from lolcats_core.model.modeling import tied_head
from lolcats_core.training.loop import Rows, TrainResult, train
from lolcats_core.training.losses import (
    CROSS_ENTROPY,
    Objective,
    layer_outputs,
    misalignment,
    plain_model,
    summed_loss,
    teacher_hidden,
)
from lolcats_core.training.perplexity import next_token_targets, perplexity
from lolcats_core.training.segments import offloaded, segmented_loss

if TYPE_CHECKING:
    from peft import PeftModel


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], objective: Objective = CROSS_ENTROPY) -> Tensor:
    """Mean of the objective over the counted targets of a batch, in float32.

    Args:
        batch: input_ids [B, T]; optional loss_mask [B, T] and position_ids [B, T].
    """
    targets, counted = next_token_targets(batch)
    layers = objective.hidden > 0
    wanted = teacher_hidden(model, batch, layers=layers) if objective.needs_teacher else []
    student = plain_model(model)
    decoded = student.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch.get("position_ids"),
        use_cache=False,
        output_hidden_states=layers,
    )
    teacher = wanted[-1][:, :-1] if objective.kl else None
    loss = summed_loss(student, decoded.last_hidden_state[:, :-1], targets, counted, objective, teacher)
    loss = loss / counted.sum().clamp(min=1)
    return loss + objective.hidden * misalignment(layer_outputs(decoded), wanted) if layers else loss


def objective_of(params: FinetuneParams) -> Objective:
    """The terms that `loss` names."""
    kl = {"cross_entropy": 0.0, "logit_kl": 1.0, "mixed": params.kl_weight}[params.loss]
    return Objective(1.0 - kl, kl, params.kl_temperature, params.hidden_weight)


def check_target_modules(student: nn.Module, params: FinetuneParams) -> None:
    """Refuse projections that the model does not have, and an output embedding that is its input embedding as well.

    Raises:
        UserError: naming the first one, and those there are.
    """
    linear: dict[Any, str] = {
        module: name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, nn.Linear)
    }
    head = linear.pop(tied_head(student), None)
    known = set(linear.values())
    for name in params.target_modules:
        if name == head:
            raise UserError(
                f"`finetune.target_modules` must leave {name!r} alone, which this teacher ties to its input embeddings"
                f" (merged, its LoRA would change those too); it may name {', '.join(sorted(known))}"
            )
        if name not in known:
            raise UserError(f"`finetune.target_modules`: the model has no {name!r}; it has {', '.join(sorted(known))}")


def check_shared_head(model: nn.Module, objective: Objective) -> None:
    """Refuse adapters on the output embedding where the teacher's logits are to come from it.

    Raises:
        UserError: both are asked for.
    """
    head = plain_model(model).get_output_embeddings()
    if objective.kl and any("lora_" in name for name, _ in head.named_parameters()):
        raise UserError("`finetune.target_modules` must leave the output embedding alone with a KL `finetune.loss`")


def add_lora(student: PreTrainedModel, params: FinetuneParams, seed: int) -> PeftModel:
    """`student` with fresh LoRA adapters on `target_modules`; everything else is frozen.

    The adapter carries the feature maps as well, so it holds all that both stages trained, and it names a module that
    only linearized models have, so peft refuses to load it onto the softmax teacher.

    Raises:
        UserError: a target module does not exist, or is tied to the input embeddings.
    """
    from peft import LoraConfig, get_peft_model  # seconds of import, which only this stage should pay

    check_target_modules(student, params)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=list(params.target_modules),
        modules_to_save=["feature_maps"],
        # Of all that peft can be asked for by name, only these modules must exist (peft 0.21).
        trainable_token_indices={"linearized": [0]},
        task_type="CAUSAL_LM",
    )
    model = cast("PeftModel", get_peft_model(student, config))
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(params.train_feature_maps and ".feature_maps.modules_to_save." in name)
    return model


def low_rank_finetune(
    student: PreTrainedModel,
    rows: Rows,
    validation: Rows,
    params: FinetuneParams,
    *,
    scratch: Path,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    offload_activations: bool = False,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> tuple[PeftModel, TrainResult]:
    """Train LoRA adapters on next tokens, the teacher's logits or both; the best by validation cross-entropy stay.

    Args:
        student: a linearized model after attention transfer; the adapters are put into it.
        scratch: directory of the step checkpoint; the same directory continues a killed run.
        offload_activations: keep what the backward pass needs in the machine's memory.

    Returns:
        The adapted model (`merge_and_unload()` gives the plain one) and what the run did.

    Raises:
        UserError: a target module does not exist or is tied, no training rows, a loss that is not finite, segments
            together with gradient checkpointing or packed documents, or a KL term with an adapted output embedding.
    """
    if params.segment_length and gradient_checkpointing:
        raise UserError(
            "`finetune.segment_length` must be null with `compute.gradient_checkpointing` (a segment's state would be"
            f" computed twice), got {params.segment_length}"
        )
    model, objective = add_lora(student, params, seed), objective_of(params)
    check_shared_head(model, objective)
    if gradient_checkpointing:
        cast(Any, student).gradient_checkpointing_enable({"use_reentrant": False})
        student.enable_input_require_grads()
    device = student.device

    def step(batch: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        model.train()
        # Around the backward pass as well: checkpointed layers run there again.
        with window_dropout(model, params.window_dropout):
            with offloaded() if offload_activations else contextlib.nullcontext():
                if params.segment_length:
                    return {"loss": segmented_loss(model, batch, params.segment_length, scale)}
                loss = next_token_loss(model, batch, objective)
            (loss * scale).backward()
        return {"loss": loss.detach()}

    def weigh(indices: np.ndarray) -> float:
        return float(next_token_targets(rows.batch(indices))[1].sum())

    def evaluate() -> dict[str, float]:
        count = min(len(validation), params.max_eval_rows or len(validation))
        result = perplexity(model, validation, batch_size=params.batch_size, max_rows=count, device=device)
        return {"loss": result.loss, "perplexity": result.perplexity}

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = train(
        trainable=trainable,
        step=step,
        rows=rows,
        params=params,
        evaluate=evaluate,
        scratch=scratch,
        seed=seed,
        device=device,
        log=log,
        label="low-rank finetuning",
        weigh=weigh,
        make_optimizer=lambda _: _adamw(trainable, params),
    )
    return cast("PeftModel", model.eval()), result


def _adamw(trainable: dict[str, nn.Parameter], params: FinetuneParams) -> torch.optim.Optimizer:
    """AdamW in which the feature maps, where they train, have their own learning rate and weight decay."""
    maps = [p for name, p in trainable.items() if "lora_" not in name]
    groups: list[dict[str, Any]] = [{"params": [p for name, p in trainable.items() if "lora_" in name]}]
    if maps:
        groups.append({"params": maps, "lr": params.map_lr or params.lr, "weight_decay": params.map_weight_decay})
    return torch.optim.AdamW(groups, lr=params.lr, weight_decay=params.weight_decay)

"""Stage 2 of vision transformers: the whole student follows its teacher's features or logits, or the labels.

Attention transfer trains each layer alone, and the small errors of early layers grow behind it. Aligning the last
hidden states of the whole network recovers most of what that costs (docs/vision.md).

# B batch, N tokens, P prefix, d hidden size, V classes
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.training_params import ImageFinetuneParams
from lolcats_core.model.forward import evaluating
from lolcats_core.model.forward_context import ignore_layer
from lolcats_core.model.vision.context import prefix_tokens
from lolcats_core.model.vision.modeling import attention_blocks, backbone, image_inputs, observed
from lolcats_core.training.attention_transfer import mean_losses
from lolcats_core.training.loop import Rows, TrainResult, train
from lolcats_core.training.losses import divergence, plain_model, without_adapters

# Weights of the patches' terms beside the prefix's cosine (IronViT, 2026).
PATCH_COSINE, PATCH_SMOOTH_L1 = 0.9, 0.1

RunTeacher = Callable[[nn.Module, dict[str, Any]], Any]


def feature_loss(student: Tensor, teacher: Tensor, prefix: int, real: Tensor | None = None) -> Tensor:
    """How far last hidden states are apart: cosine of the prefix, cosine and smooth L1 of the patches, in float32.

    Args:
        student, teacher: [B, N, d], the prefix first. real: [B, N], False at padding, or None.
    """
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    apart = 1 - F.cosine_similarity(student, teacher, dim=-1)
    jumps = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    patches = torch.ones_like(apart, dtype=torch.bool) if real is None else real.clone()
    patches[:, :prefix] = False
    loss = PATCH_COSINE * apart[patches].mean() + PATCH_SMOOTH_L1 * jumps[patches].mean()
    return loss + apart[:, :prefix].mean() if prefix else loss


def image_loss(
    model: nn.Module,
    teacher: Callable[[nn.Module, dict[str, Any]], Any],
    batch: dict[str, Tensor],
    params: ImageFinetuneParams,
) -> Tensor:
    """The objective of one batch, in float32.

    Args:
        model: the student, with or without adapters. teacher: runs the teacher of a module of `model` on its inputs.
        batch: what the model takes, and with cross-entropy labels int64 [B].
    """
    plain = plain_model(model)
    inputs = image_inputs(plain, batch)
    if params.loss == "feature":
        part = backbone(plain)
        wanted, found = teacher(part, inputs).last_hidden_state, part(**inputs).last_hidden_state
        real = plain.image_pass.grid.real(found.shape[1], found.device)
        return feature_loss(found, wanted, prefix_tokens(plain.config), real)
    weight = {"logit_kl": 1.0, "cross_entropy": 0.0, "mixed": params.kl_weight}[params.loss]
    loss: Any = 0.0
    wanted = teacher(plain, inputs).logits if weight else None
    logits = plain(**inputs).logits.float()
    if wanted is not None:
        loss = loss + weight * divergence(wanted.float(), logits, params.kl_temperature).mean()
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(logits, batch["labels"])
    return cast(Tensor, loss)


def check_objective(student: nn.Module, rows: Rows, params: ImageFinetuneParams) -> None:
    """Refuse a loss for which the model or the rows lack something.

    Raises:
        UserError: naming the loss and what is missing.
    """
    if params.loss == "feature":
        return
    if backbone(student) is student:
        raise UserError(f"`loss` {params.loss} needs a model with a classifier, got {type(student).__name__}")
    if params.loss != "logit_kl" and len(rows) and "labels" not in rows.batch(np.arange(1)):
        raise UserError(f"`loss` {params.loss} needs rows with labels, got {', '.join(rows.batch(np.arange(1)))}")


def attention_projections(student: nn.Module) -> list[str]:
    """Last parts of the names of the attention's linear layers, in order."""
    linear = (name for block in attention_blocks(student) for name, part in block.named_modules() if _is_linear(part))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def add_image_lora(student: PreTrainedModel, params: ImageFinetuneParams, seed: int) -> Any:
    """`student` with fresh LoRA adapters; everything else is frozen but, if asked for, the feature maps.

    Raises:
        UserError: a target module does not exist.
    """
    from peft import LoraConfig, get_peft_model  # seconds of import, which only this stage should pay

    known = {name.rpartition(".")[2] for name, part in student.named_modules() if _is_linear(part)}
    targets = params.target_modules or tuple(attention_projections(student))
    for name in targets:
        if name not in known:
            raise UserError(f"`target_modules`: the model has no {name!r}; it has {', '.join(sorted(known))}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=list(targets),
        modules_to_save=["feature_maps"],
        trainable_token_indices={"linearized": [0]},
    )
    model = get_peft_model(student, config)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(params.train_feature_maps and ".feature_maps.modules_to_save." in name)
    return model


def image_finetune(
    student: PreTrainedModel,
    rows: Rows,
    validation: Rows,
    params: ImageFinetuneParams,
    *,
    scratch: Path,
    seed: int = 0,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> tuple[nn.Module, TrainResult]:
    """Train a linearized vision transformer as a whole; the best by the objective on `validation` stays.

    Args:
        student: after attention transfer. With ``full`` its weights become its own and no longer the teacher's.
        rows, validation: of `image_rows`.
        scratch: directory of the step checkpoint; the same directory continues a killed run.

    Returns:
        The model, with ``lora`` a `PeftModel` (`merge_and_unload()` gives the plain one), and what the run did.

    Raises:
        UserError: no classifier or labels for the loss, an unknown target module, no training rows, or a loss that is
            not finite.
    """
    check_objective(student, rows, params)
    model, teacher = _lora(student, params, seed) if params.scope == "lora" else _whole(student)
    device = student.device

    def step(batch: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        model.train()
        loss = image_loss(model, teacher, batch, params)
        (loss * scale).backward()
        return {"loss": loss.detach()}

    def measure(indices: np.ndarray) -> dict[str, Tensor]:
        batch = {name: value.to(device) for name, value in validation.batch(indices).items()}
        return {"loss": image_loss(model, teacher, batch, params)}

    def evaluate() -> dict[str, float]:
        count = min(len(validation), params.max_eval_rows or len(validation))
        with evaluating(model):
            return mean_losses(measure, count, params.batch_size)

    result = train(
        trainable={name: p for name, p in model.named_parameters() if p.requires_grad},
        step=step,
        rows=rows,
        params=params,
        evaluate=evaluate,
        scratch=scratch,
        seed=seed,
        device=device,
        log=log,
        label="image finetuning",
    )
    return model.eval(), result


def _lora(student: PreTrainedModel, params: ImageFinetuneParams, seed: int) -> tuple[nn.Module, RunTeacher]:
    """The adapted model; its teacher is itself without adapters and with softmax attention in every layer."""
    model = add_image_lora(student, params, seed)

    @torch.no_grad()
    def teacher(part: nn.Module, inputs: dict[str, Any]) -> Any:
        training = part.training
        part.eval()
        with without_adapters(model), observed(student, ignore_layer):
            out = part(**inputs)
        part.train(training)
        return out

    return model, teacher


def _whole(student: PreTrainedModel) -> tuple[nn.Module, RunTeacher]:
    """The student with weights of its own, all of which train; its teacher is a copy of what it was."""
    reference = copy.deepcopy(student).requires_grad_(False).eval()
    parts = {id(own): other for own, other in zip(student.modules(), reference.modules(), strict=True)}
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(name != "linearized.weight")

    @torch.no_grad()
    def teacher(part: nn.Module, inputs: dict[str, Any]) -> Any:
        with observed(reference, ignore_layer):
            return parts[id(part)](**inputs)

    return student, teacher

"""Stage 2's losses from final hidden states, with the logits of a slice of positions at a time.

The student holds its teacher: without the adapters its weights are the teacher's, and with softmax attention in every
layer so is its function. So the teacher's logits need no second model.

# B batch, T tokens, d hidden size, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lolcats_core.model.families import family_of
from lolcats_core.model.forward import MAX_FLOAT_LOGITS
from lolcats_core.model.forward_context import HybridContext, ignore_layer


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of stage 2's loss, and the temperature of the second.

    ``kl`` is T² KL(teacher / T ‖ student / T) in nats: T² keeps the gradients' size (arXiv 1503.02531, section 2).
    ``hidden`` is the `misalignment` of the layers' outputs.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.hidden > 0


CROSS_ENTROPY = Objective()
KL = Objective(cross_entropy=0.0, kl=1.0)


def plain_model(model: nn.Module) -> Any:
    """The causal language model inside a `PeftModel`, or `model` itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def output_logits(student: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of final hidden states [..., d], as the supported families compute them."""
    config, family = student.config, family_of(student.config)
    logits = student.get_output_embeddings()(hidden)
    if family.logits_divisor is not None:
        logits = logits / getattr(config, family.logits_divisor)
    cap = None if family.logits_softcap is None else getattr(config, family.logits_softcap)
    return logits if cap is None else (logits / cap).tanh() * cap


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block, the weights are those without LoRA; which parameters train stays as it is."""
    if not hasattr(model, "get_base_model"):
        yield
        return
    trains = [(p, p.requires_grad) for p in model.parameters()]
    with cast(Any, model).disable_adapter():
        yield
    # peft switches on whatever an adapter brought along (peft 0.21).
    for parameter, wanted in trains:
        parameter.requires_grad_(wanted)


@torch.no_grad()
def teacher_hidden(model: nn.Module, batch: dict[str, Tensor], *, layers: bool = False) -> list[Tensor]:
    """The teacher's final hidden states [B, T, d], from the student that shares its weights; the last of the list.

    Args:
        model: a linearized model, with or without LoRA adapters on its layers.
        batch: input_ids [B, T] and, for packed documents, position_ids [B, T].
        layers: the outputs of the layers before as well.
    """
    positions = batch.get("position_ids")
    context = HybridContext.observed(ignore_layer, positions)
    with without_adapters(model):
        decoder = plain_model(model).base_model
        out = decoder(
            input_ids=batch["input_ids"],
            position_ids=positions,
            use_cache=False,
            hybrid=context,
            output_hidden_states=layers,
        )
    return layer_outputs(out) if layers else [out.last_hidden_state]


def layer_outputs(out: Any) -> list[Tensor]:
    """Every layer's output of a decoder called with `output_hidden_states`; the last one behind the final norm."""
    return list(out.hidden_states[1:])


def misalignment(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the squared error of hidden states [B, T, d] over the teacher's mean square, in float32.

    Over the rows of a forward pass, so each micro-batch and each process normalises by its own rows.
    """
    errors = []
    for given, wanted in zip(student, teacher, strict=True):
        wide = torch.promote_types(wanted.dtype, torch.float32)
        errors.append(F.mse_loss(given.to(wide), wanted.to(wide)) / wanted.to(wide).square().mean())
    return torch.stack(errors).mean()


def summed_loss(
    student: Any,
    hidden: Tensor,
    targets: Tensor,
    counted: Tensor,
    objective: Objective = CROSS_ENTROPY,
    teacher: Tensor | None = None,
) -> Tensor:
    """Sum of the objective in at least float32 over counted targets.

    Where the logits (of both models, with a KL term) would pass `MAX_FLOAT_LOGITS` they are made a slice of positions
    at a time, in the backward pass again.

    Args:
        hidden: final hidden states [B, T, d] that predict `targets` [B, T]; `counted`: [B, T] bool.
        teacher: the teacher's final hidden states [B, T, d], for the KL term.
    """

    def part(hidden: Tensor, targets: Tensor, counted: Tensor, teacher: Tensor | None) -> Tensor:
        logits = output_logits(student, hidden).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = torch.zeros_like(logits[:, 0])
        if objective.cross_entropy:
            losses = losses + objective.cross_entropy * F.cross_entropy(logits, targets.flatten(), reduction="none")
        if teacher is not None:
            with torch.no_grad():
                wanted = output_logits(student, teacher).flatten(0, 1).to(logits.dtype)
            losses = losses + objective.kl * divergence(wanted, logits, objective.temperature)
        return (losses * counted.flatten().to(losses.dtype)).sum()

    held = len(targets) * (1 if teacher is None else 3)
    width = max(1, MAX_FLOAT_LOGITS // (student.config.vocab_size * held))
    if width >= targets.shape[1]:
        return part(hidden, targets, counted, teacher)
    slices = [x.split(width, 1) for x in (hidden, targets, counted)]
    wanted = [None] * len(slices[0]) if teacher is None else teacher.split(width, 1)
    sums = [checkpoint(part, *given, use_reentrant=False) for given in zip(*slices, wanted, strict=True)]
    return torch.stack(cast(list[Tensor], sums)).sum()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher / T ‖ student / T) in nats of logits [..., V], summed over the vocabulary."""
    wanted, given = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    return temperature**2 * F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)

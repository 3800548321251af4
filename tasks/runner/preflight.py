"""What a later stage would refuse, refused before a run and before each expensive stage starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lolcats_common.errors import UserError
from lolcats_common.params import Params
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.data import sources
from lolcats_core.evaluation import synthetic
from lolcats_core.evaluation.task_files import task_folder
from lolcats_core.model.modeling import empty_student
from lolcats_core.teacher.pin import Teacher, examine_teacher
from lolcats_core.training.low_rank_finetune import check_target_modules
from lolcats_core.training.selection import check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_run(params: Params, root: Path) -> None:
    """Everything that a run would refuse and that this machine can tell now; a Hugging Face id is left to its stage.

    Raises:
        UserError: the text or the teacher is not there or of no use, or as `check`.
    """
    sources.describe(params.data, root, lambda file: "")
    config = examine_teacher(params.teacher, root)
    if config is not None:
        check(params, config)


def check_pinned(params: Params, root: Path) -> None:
    """`check` against the teacher that the stage `teacher` pinned.

    Raises:
        UserError: the pin is missing or damaged, or as `check`.
    """
    check(params, Teacher.open(root / "outputs" / "teacher").config)


def check(params: Params, teacher: PreTrainedConfig) -> None:
    """Hold the parameters of every stage against the teacher's configuration; loads no weights.

    Raises:
        UserError: the maps, the softmax budget or LoRA do not fit the teacher's shape, a row lies in the window, a row
            or a recall string is longer than the teacher's context, segments meet packed documents or checkpointing,
            or a task does not exist or runs what the model writes.
    """
    with torch.device("meta"):
        check_target_modules(empty_student(teacher, params.linearize), params.finetune)
    params.linearize.check_length("`data.sequence_length`", params.data.sequence_length)
    check_budget(params.select, params.linearize, teacher, resolve_dtype(params.compute.precision))
    context = getattr(teacher, "max_position_embeddings", None)
    own = set(synthetic.TASKS) & set(params.evaluate.tasks)
    longest = {
        "data.sequence_length": params.data.sequence_length,
        "data.position_range": params.data.position_range or 0,
        "select.probe_length": params.select.probe_length or 0,
        "evaluate.recall_gaps (twice the largest)": 2 * max(params.evaluate.recall_gaps, default=0),
        "evaluate.synthetic_lengths": max(params.evaluate.synthetic_lengths, default=0) if own else 0,
    }
    for name, length in longest.items():
        if context is not None and length > context:
            raise UserError(f"`{name}` must be at most the teacher's context of {context} tokens, got {length}")
    segment = params.finetune.segment_length
    if segment and (params.compute.gradient_checkpointing or params.data.packing == "documents"):
        reason = "`data.packing: documents`" if params.data.packing == "documents" else "gradient checkpointing"
        raise UserError(f"`finetune.segment_length` must be null with {reason}, got {segment}")
    for task in (*params.evaluate.tasks, *params.evaluate.num_fewshot):
        task_folder(task, ())

"""Stage 1 of a student however it is held: in memory, with all layers at once, or one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lolcats_common.params import TransferParams
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import Student, causal_model
from lolcats_core.training.attention_transfer import Errors, attention_transfer, head_errors
from lolcats_core.training.loop import Rows, TrainResult
from lolcats_core.training.streamed_transfer import streamed_attention_transfer


def transfer(
    student: Student,
    rows: Rows,
    validation: Rows,
    params: TransferParams,
    *,
    scratch: Path,
    seed: int = 0,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> tuple[dict[str, Tensor], TrainResult, Errors]:
    """Train a student's feature maps and measure their errors.

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

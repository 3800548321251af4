"""Stage `select`: what keeps softmax attention, within the budget, by what stage 1 measured."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("select", preflight=True)  # before the imports below, which take seconds

from collections.abc import Mapping
from typing import Any

import torch

from lolcats_common.errors import UserError
from lolcats_common.files import read_json, write_json
from lolcats_core import linearize, load_feature_maps
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.data.rows import open_split
from lolcats_core.estimation.memory import ModelShape, device_memory, evaluated_by_layers
from lolcats_core.model.forward import rows_per_forward
from lolcats_core.model.map_files import read_feature_maps, restrict_maps, write_feature_maps
from lolcats_core.model.modeling import empty_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.ranking.criteria import NEEDS_STUDENT, NEEDS_TEACHER
from lolcats_core.training.ranking.retrieval import retrieval_of
from lolcats_core.training.selection import choose_softmax, student_divergence
from tasks.reporting.figures import allocation_figure, selection_figure
from tasks.runner.artifacts import MAPS
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write selection.json, its plot, and feature_maps.safetensors of what stays linear."""
    params, settings = stage.params.select, stage.params.linearize
    teacher = Teacher.open(stage.input("teacher"))
    saved = read_json(stage.input("transfer") / "errors.json", "run `dvc repro transfer`")
    errors = {int(layer): each for layer, each in saved.items()}
    measures = _measures(stage, teacher) if params.chooses else {}
    dtype = resolve_dtype(stage.params.compute.precision)
    selection = choose_softmax(
        params, settings, teacher.config, errors, seed=stage.params.seed, dtype=dtype, **measures
    )

    maps = read_feature_maps(stage.input("transfer") / MAPS, settings.to_dict())
    with torch.device("meta"):
        made, kept = (empty_student(teacher.config, each) for each in (settings, selection.settings))
    write_feature_maps(restrict_maps(maps, made, kept), selection.settings, stage.out / MAPS)
    found = selection.to_dict(params)
    write_json(stage.out / "selection.json", found)
    if selection.scores:
        figure = selection_figure(found)
        stage.log_figure("selection.png", figure)
        figure.savefig(stage.out / "selection.png", metadata={"Software": None})
    if "allocation" in found:
        picture = allocation_figure(found["allocation"])
        stage.log_figure("allocation.png", picture)
        picture.savefig(stage.out / "allocation.png", metadata={"Software": None})
    return {"cache_ratio": selection.cache_ratio, "kept": float(len(selection.kept))}


def _measures(stage: Stage, source: Teacher) -> dict[str, Any]:
    """What the criterion needs besides stage 1's errors, as arguments of `choose_softmax`.

    Raises:
        UserError: it needs the whole teacher, which does not fit this machine.
    """
    params, settings = stage.params.select, stage.params.linearize
    if params.criterion not in (*NEEDS_STUDENT, *NEEDS_TEACHER):
        return {}
    device, dtype = stage.device(), resolve_dtype(stage.params.compute.precision)
    shape = ModelShape.from_config(source.config)
    if evaluated_by_layers(stage.params, shape, device_memory(device)):
        raise UserError(
            "`select.criterion` must be transfer_error or normalized_transfer_error for a teacher that does not fit"
            f" the memory of {device} (no other runs layer by layer), got {params.criterion}"
        )
    train, rows = open_split(stage.input("prepare"))
    teacher = source.load(dtype, device)
    if params.criterion in NEEDS_TEACHER:
        return {"retrieval": retrieval_of(teacher, train, source.tokenizer(), params, stage.params.seed)}
    student = linearize(teacher, settings)
    load_feature_maps(student, stage.input("transfer") / MAPS)
    batch_size = rows_per_forward(params.rows, rows.sequence_length, teacher.config.vocab_size)
    return {"divergence": student_divergence(teacher, student, rows, params.rows, batch_size)}

"""Stage `select`: what keeps softmax attention, within the budget, by what stage 1 measured."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("select")  # before the imports below, which take seconds

import json
from collections.abc import Mapping

import torch

from lolcats_common.files import write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core import linearize, load_feature_maps
from lolcats_core.compute.device import resolve_dtype
from lolcats_core.model.forward import rows_per_forward
from lolcats_core.model.map_files import read_feature_maps, restrict_maps, write_feature_maps
from lolcats_core.model.modeling import empty_student
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.selection import NEEDS_MODEL, Divergence, choose_softmax, student_divergence
from tasks.reporting.figures import selection_figure
from tasks.runner.artifacts import MAPS, open_rows
from tasks.runner.stage import Stage


def run(stage: Stage) -> Mapping[str, float]:
    """Write selection.json, its plot, and feature_maps.safetensors of what stays linear."""
    params, settings = stage.params.select, stage.params.linearize
    teacher = Teacher.open(stage.input("teacher"))
    saved = json.loads((stage.input("transfer") / "errors.json").read_text(encoding="utf-8"))
    errors = {int(layer): each for layer, each in saved.items()}
    needed = params.softmax_budget is not None and params.criterion in NEEDS_MODEL
    divergence = _divergence(stage, teacher, settings) if needed else None
    selection = choose_softmax(params, settings, teacher.config, errors, seed=stage.params.seed, divergence=divergence)

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
    return {"cache_ratio": selection.cache_ratio, "kept": float(len(selection.kept))}


def _divergence(stage: Stage, source: Teacher, settings: LinearizeConfig) -> Divergence:
    device, dtype = stage.device(), resolve_dtype(stage.params.compute.precision)
    _, rows = open_rows(stage)
    teacher = source.load(dtype, device)
    student = linearize(teacher, settings)
    load_feature_maps(student, stage.input("transfer") / MAPS)
    count = stage.params.select.rows
    batch_size = rows_per_forward(count, rows.sequence_length, teacher.config.vocab_size)
    return student_divergence(teacher, student, rows, count, batch_size)

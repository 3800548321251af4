"""The study of a project: its teacher and rows of text, and a place for trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lolcats_common.params import Params
from lolcats_core.experiments.study import EvalSettings, StudyContext
from tasks.runner.logs import quiet_progress_bars
from tasks.versioning import dvc_graph

NEEDED = ("teacher", "prepare")


def open_study(
    root: Path, params: Params, settings: EvalSettings, environment: Mapping[str, str] | None = None
) -> StudyContext:
    """Bring the stages `teacher` and `prepare` up to date and open the study of their outputs.

    All studies of a checkout keep their trials in one folder, so they share every attention transfer.

    Args:
        environment: of the stages, where `root` is a worktree.

    Raises:
        UserError: a stage failed, or the device does not exist.
    """
    for stage in NEEDED:
        dvc_graph.repro(stage, root, environment)
    quiet_progress_bars()
    outputs = root / "outputs"
    return StudyContext.open(outputs / "teacher", outputs / "prepare", params, settings, root / ".scratch" / "trials")

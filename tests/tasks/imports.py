"""Which of the project's files decide what a stage computes, read from the imports of its module."""

from __future__ import annotations

from pathlib import Path

from lolcats_common.import_closure import PACKAGES, import_closure

# The harness and what only reads, writes, checks or shows: a change there does not change a result. What they import
# does not count for them either; a stage that needs it imports it itself.
NEUTRAL = {
    "lolcats_common/errors.py",
    "lolcats_common/secrets.py",
    "lolcats_common/files.py",
    "lolcats_common/params.py",
    "lolcats_common/progress.py",
    "lolcats_common/records.py",
    "lolcats_common/sources.py",
    "lolcats_core/compute/device.py",
    "lolcats_core/compute/numbers.py",
    "lolcats_common/training_params.py",
    "tasks/reporting/figures.py",
    "tasks/runner/logs.py",
    "tasks/runner/preflight.py",
    "tasks/runner/stage.py",
    "tasks/runner/mlflow_run.py",
}


def imported_files(root: Path, module: str) -> set[str]:
    """Every file of the project that `module` needs, its own included, without the neutral ones."""

    def neutral(file: Path) -> bool:
        return file.relative_to(root).as_posix() in NEUTRAL

    files = import_closure(module, root=root, packages={**PACKAGES, "tasks": "tasks"}, skip=neutral).values()
    # A package's `__init__` without code decides nothing.
    return {file.relative_to(root).as_posix() for file in files if file.stat().st_size}

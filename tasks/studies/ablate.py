"""`lolcats ablate`: the paper's ablation on the project's teacher and text, kept as reports and in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lolcats_common.machine import device_tags
from lolcats_common.params import Params
from lolcats_core.experiments import ablation
from lolcats_core.experiments.ablation import Budget
from lolcats_core.experiments.ablation_report import report_on, write_report
from lolcats_core.experiments.trials import Trial
from tasks.runner.mlflow_run import Run, first_line
from tasks.studies.project import open_study

REPORTS = "reports"


def ablate(
    root: Path,
    params: Params,
    budget: Budget,
    sections: Sequence[str] = ablation.SECTIONS,
    environment: Mapping[str, str] | None = None,
    store: Path | None = None,
) -> dict[str, Any]:
    """Run every trial of `sections` and write reports/ablation.json and reports/ablation.md.

    Args:
        root: checkout or worktree whose teacher and rows are used; brought up to date first.
        environment: of the stages, where `root` is a worktree.
        store: checkout that holds the MLflow store and receives the reports; `root` by default.

    Raises:
        UserError: a stage failed, or a section does not exist.
    """
    ablation.check_sections(sections)
    store = store or root
    study = open_study(root, params, budget.evaluation(params.seed), environment)
    run = Run.start(store, "ablate", params=params, tags=device_tags())

    def note(trial: Trial, row: Mapping[str, Any]) -> None:
        if row["after"] is not None:
            run.log_metrics({trial.name: row["after"]})

    try:
        report = report_on(
            study, params, budget, params.teacher.source, ablation.run(study, params, budget, sections, note)
        )
        run.log_text(write_report(report, store / REPORTS), "ablation.md")
    except Exception as error:
        run.finish("FAILED", first_line(error))
        raise
    except BaseException:
        run.finish("KILLED")
        raise
    run.finish()
    return report

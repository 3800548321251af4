"""`lolcats ablate`: the paper's ablation on the project's teacher and text, kept as reports and in MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lolcats_common.files import sha256_json
from lolcats_common.machine import device_tags
from lolcats_common.params import Params
from lolcats_core.experiments import ablation
from lolcats_core.experiments.ablation import Budget, Row
from lolcats_core.experiments.ablation_report import report_on, write_report
from tasks.runner.logs import quiet_progress_bars
from tasks.runner.mlflow_run import Run, first_line
from tasks.runner.stage import scratch_key
from tasks.versioning import dvc_graph

NEEDED = ("teacher", "prepare")
REPORTS = "reports"


def ablate(
    root: Path,
    params: Params,
    budget: Budget,
    sections: Sequence[str] = ablation.SECTIONS,
    environment: Mapping[str, str] | None = None,
    store: Path | None = None,
) -> dict[str, Any]:
    """Run every row of `sections` and write reports/ablation.json and reports/ablation.md.

    Args:
        root: checkout or worktree whose teacher and rows are used; brought up to date first.
        environment: of the stages, where `root` is a worktree.
        store: checkout that holds the MLflow store and receives the reports; `root` by default.

    Raises:
        UserError: a stage failed, or a section does not exist.
    """
    ablation.check_sections(sections)
    for stage in NEEDED:
        dvc_graph.repro(stage, root, environment)
    store = store or root
    key = {"transfer": scratch_key("transfer", root, params), "finetune": dataclasses.asdict(params.finetune)}
    scratch = root / ".scratch" / "ablate" / f"{sha256_json(key)[:16]}-{budget.slug()}"
    quiet_progress_bars()
    setting = ablation.load_setting(root / "outputs" / "teacher", root / "outputs" / "prepare", params, budget, scratch)
    run = Run.start(store, "ablate", params=params, tags=device_tags())

    def note(row: Row, measured: Mapping[str, Any]) -> None:
        if measured["after"] is not None:
            run.log_metrics({f"{row.section}/{row.label}": measured["after"]})

    try:
        report = report_on(setting, params.teacher.source, ablation.run(setting, sections, note))
        run.log_text(write_report(report, store / REPORTS), "ablation.md")
    except Exception as error:
        run.finish("FAILED", first_line(error))
        raise
    except BaseException:
        run.finish("KILLED")
        raise
    run.finish()
    return report

"""Stage `report`: one HTML file with everything that a run found, which a browser alone opens."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("report")  # before the imports below, which take seconds

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lolcats_common.files import read_json, read_json_lines, write_json, write_text
from lolcats_common.records import SIDES, STEPS, Evaluation, SelectionRecord
from tasks.reporting import figures
from tasks.reporting.report_html import Facts, page
from tasks.runner.stage import Stage

STAGES = ("teacher", "prepare", "transfer", "select", "finetune", "evaluate")


def run(stage: Stage) -> Mapping[str, float]:
    """Write report.html and its figures; its size is the only metric."""
    params = stage.params
    facts = Facts(
        made=f"{datetime.now(UTC):%Y-%m-%d}",
        evaluation=read(stage, "evaluate", "evaluation.json"),
        speed=read(stage, "evaluate", "speed.json"),
        metrics={name: read(stage, name, "metrics.json") for name in STAGES},
        runs={name: read(stage, name, "run.json") for name in STAGES},
        teacher=read(stage, "teacher", "teacher.json"),
        recipe={
            "seed": params.seed,
            "linearize": params.linearize.to_dict(),
            "transfer": vars(params.transfer),
            "select": vars(params.select),
            "finetune": vars(params.finetune),
            "data": vars(params.data),
        },
    )
    histories = {name: history(stage, name) for name in ("transfer", "finetune")}
    for name, points in plots(facts.evaluation, histories).items():
        write_json(stage.out / "plots" / f"{name}.json", points)
    drawn = draw(facts.evaluation, read(stage, "select", "selection.json"), histories, params.data.sequence_length)
    with matplotlib.rc_context({"svg.hashsalt": "lolcats"}):  # the same figures are the same bytes
        for name, figure in drawn.items():
            figure.savefig(stage.out / f"{name}.svg", metadata={"Date": None, "Creator": None})
    html = page(facts, {name: (stage.out / f"{name}.svg").read_text(encoding="utf-8") for name in drawn})
    write_text(stage.out / "report.html", html)
    stage.log_text("report.html", html)
    return {"bytes": len(html.encode())}


def read(stage: Stage, name: str, file: str) -> Any:
    """A JSON object among an earlier stage's outputs.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_json(stage.input(name) / file, f"run `dvc repro {name}`")


def history(stage: Stage, name: str) -> list[dict[str, float]]:
    """A training stage's history; empty where nothing was trained."""
    return read_json_lines(stage.input(name) / "history.jsonl", f"run `dvc repro {name}`")


def plots(evaluation: Evaluation, histories: Mapping[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Points that DVC plots and compares between revisions, by the name of their file; JSON lines it cannot read."""
    found = {
        f"{stage}/{part}": [{"step": e["step"], "loss": e[key]} for e in entries if key in e]
        for stage, entries in histories.items()
        for part, key in (("training", "train_loss"), ("validation", "validation_loss"))
    }
    recall, positions = evaluation["recall"], evaluation["positions"]
    found["recall"] = [
        {"gap": int(gap)} | {side: recall[side][gap]["value"] for side in SIDES}
        for gap in sorted(recall.get("teacher", {}), key=int)
    ]
    ranges = zip(*(positions[side]["ranges"] for side in SIDES), strict=True) if positions else ()
    found["positions"] = [
        {"position": entry[0]["stop"]} | {side: e["loss"] for side, e in zip(SIDES, entry, strict=True)}
        for entry in ranges
    ]
    return found


def draw(
    evaluation: Evaluation, selection: SelectionRecord, histories: Mapping[str, list[dict[str, float]]], trained: int
) -> dict[str, Figure]:
    """Every figure that the results allow, by name, in the report's order.

    Args:
        trained: the length of the training rows in tokens.
    """
    transfer, finetune = histories["transfer"], histories["finetune"]
    perplexity, audit = evaluation["perplexity"], evaluation["audit"]
    drawn: dict[str, Figure | None] = {
        "perplexity": figures.perplexity_figure(
            {step: perplexity[step] for step in (*STEPS, "bigram") if step in perplexity}
        )
    }
    if any(evaluation["recall"].values()):
        drawn["recall"] = figures.recall_figure(evaluation["recall"])
    drawn["recovery"] = figures.recovery_figure(evaluation["tasks"])
    if evaluation["positions"]:
        drawn["positions"] = figures.positions_figure(evaluation["positions"], trained)
    if audit:
        drawn["audit"] = figures.audit_figure(audit)
        if audit["linear_mass"]:
            title = "Share of attention outside the window (carried by the linear branch)"
            drawn["linear_mass"] = figures.heads_figure(audit["linear_mass"], title, "share")
        if audit["head_errors"]:
            title = "Transfer error by layer and linearized head"
            drawn["head_errors"] = figures.heads_figure(audit["head_errors"], title, "relative error", log_scale=True)
        if audit["entropy"] and audit["head_errors"]:
            drawn["entropy"] = figures.entropy_figure(audit["entropy"], audit["head_errors"])
    if transfer:
        drawn["transfer_loss"] = figures.loss_figure(transfer, "Attention transfer", log_scale=True)
        drawn["transfer_layers"] = figures.layer_figure(transfer, "Attention transfer: error by layer")
    if any(entry["score"] is not None for entry in selection["candidates"]):
        drawn["selection"] = figures.selection_figure(selection)
    if "allocation" in selection:
        drawn["allocation"] = figures.allocation_figure(selection["allocation"])
    if finetune:
        drawn["finetune_loss"] = figures.loss_figure(finetune, "Low-rank finetuning")
    return {name: figure for name, figure in drawn.items() if figure is not None}

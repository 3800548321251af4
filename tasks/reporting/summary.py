"""The final table, teacher beside student, and the same numbers for machines in reports/summary.json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats_common.files import read_json, write_json
from lolcats_common.records import (
    BIGRAM,
    CONTROL,
    SIDES,
    STEPS,
    Evaluation,
    Positions,
    StageRecord,
    Summary,
    control_line,
)
from lolcats_common.tables import markdown_table, measured, number
from tasks.registry.register import RegisteredVersion
from tasks.registry.versions import VersionStatus
from tasks.versioning.dvc_graph import Reproduced

REPORT = Path("reports") / "summary.json"
NEXT = {
    "runs, plots and the registry": "ui",
    "let the student write": 'generate "def " --temperature 0.7 --top-p 0.9',
    "what a real model needs": "doctor --preset llama3_1_8b",
}
REUSED = {"ran": "ran", "restored": "reused (DVC's run cache)", "unchanged": "reused (unchanged)"}


def build(
    root: Path,
    stages: Sequence[Reproduced],
    registered: RegisteredVersion | None = None,
    run_id: str | None = None,
    experiment: str | None = None,
    status: VersionStatus | None = None,
) -> Summary:
    """Collect the numbers of a finished run from outputs/.

    Args:
        status: gate result and aliases of the registered version.

    Raises:
        UserError: a stage's result is missing or damaged.
    """
    evaluation: Evaluation = _read(root, "evaluate", "evaluation.json")
    perplexity = evaluation.get("perplexity") or {}
    teacher = perplexity.get("teacher")
    return {
        "perplexity": perplexity,
        "perplexity_ratio": {k: v / teacher for k, v in perplexity.items() if k != "teacher"} if teacher else {},
        "recall": evaluation.get("recall") or {},
        "positions": evaluation.get("positions") or {},
        "control": evaluation.get("control"),
        "tasks": evaluation.get("tasks") or {},
        "lm_eval_version": evaluation.get("lm_eval_version"),
        "stages": {done.stage: _stage(root, done) for done in stages},
        "registered": registered.to_record() if registered else None,
        "gates": status.to_record() if status else None,
        "mlflow_run_id": run_id,
        "experiment": experiment,
    }


def _stage(root: Path, done: Reproduced) -> StageRecord:
    metrics = _read(root, done.stage, "metrics.json")
    entry: StageRecord = {
        "state": done.state,
        "seconds": metrics.get("stage_seconds", metrics.get("seconds")),
        "wall_seconds": done.seconds,
    }
    if "tokens" in metrics:
        entry["tokens"] = metrics["tokens"]
    if "trainable_parameters" in metrics:
        entry["trainable_parameters"] = metrics["trainable_parameters"]
    if "total_parameters" in metrics:
        entry["total_parameters"] = metrics["total_parameters"]
    if entry.get("total_parameters") and "trainable_parameters" in entry:
        entry["trainable_share"] = entry["trainable_parameters"] / entry["total_parameters"]
    return entry


def _read(root: Path, stage: str, file: str) -> Any:
    return read_json(root / "outputs" / stage / file, f"remove outputs/{stage} and run `dvc repro`")


def write(root: Path, summary: Summary) -> Path:
    """Write reports/summary.json atomically."""
    write_json(root / REPORT, summary)
    return root / REPORT


def headline(summary: Summary) -> dict[str, float]:
    """The main results as flat metrics, for the parent run."""
    flat = {f"perplexity/{step}": value for step, value in summary["perplexity"].items()}
    for side, gaps in summary["recall"].items():
        flat |= {f"recall/{side}/gap_{gap}": result["value"] for gap, result in gaps.items()}
    if summary["control"]:
        flat["perplexity/control"] = summary["control"]["perplexity"]
    for name, task in summary["tasks"].items():
        flat |= {f"{name}/{side}": task[side]["value"] for side in SIDES if side in task}
    return flat


def result_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """Rows of the main table: what, teacher, student, student over teacher, control (`CONTROL`)."""
    rows = []
    perplexity, ratio, control = summary["perplexity"], summary["perplexity_ratio"], summary["control"]
    for step, label in STEPS.items():
        if step not in perplexity:
            continue
        value = number(perplexity[step])
        beside = number(control["perplexity"]) if control and step == "finetuned" else ""
        cells = (value, "", "", "") if step == "teacher" else ("", value, f"{number(ratio.get(step))}x", beside)
        rows.append((f"perplexity, {label}", *cells))
    if "bigram" in perplexity:
        rows.append((f"perplexity, {BIGRAM}", number(perplexity["bigram"]), "", "", ""))
    sides: list[Positions | None] = [summary["positions"].get(side) for side in SIDES]
    sides.append(control["positions"] if control else None)
    newest = [found["ranges"][-1] if found and found["ranges"] else None for found in sides]
    if newest[0] is not None:
        label = f"loss at {newest[0]['start']} to {newest[0]['stop']} tokens"
        losses = ["" if each is None else f"{each['loss']:.3f}" for each in newest]
        rows.append((label, losses[0], losses[1], "", losses[2]))
    teacher, student = (summary["recall"].get(side) or {} for side in SIDES)
    for gap in sorted(teacher, key=int):
        beside = measured(control["recall"].get(gap)) if control else ""
        rows.append((f"copying recall at gap {gap}", measured(teacher[gap]), measured(student.get(gap)), "", beside))
    for name, task in summary["tasks"].items():
        label = f"{name} ({task.get('metric', 'acc')}, {task.get('items', '?')} items)"
        rows.append((label, measured(task.get("teacher")), measured(task.get("finetuned")), "", ""))
    return rows


def stage_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """Rows of the stage table: stage, tokens, trainable share, seconds, whether it ran."""
    rows = []
    for name, entry in summary["stages"].items():
        tokens = f"{entry['tokens']:,.0f}" if entry.get("tokens") is not None else ""
        share = f"{100 * entry['trainable_share']:.2f} %" if "trainable_share" in entry else ""
        seconds = f"{entry['seconds']:.0f}" if entry["seconds"] is not None else ""
        rows.append((name, tokens, share, seconds, REUSED[entry["state"]]))
    return rows


def markdown(summary: Summary) -> str:
    """Both tables as Markdown."""
    results = markdown_table(("", *SIDES.values(), "ratio", CONTROL), result_rows(summary))
    stages = markdown_table(("stage", "tokens", "trainable", "seconds", ""), stage_rows(summary))
    legend = f"\n\n{control_line(summary['control'])}" if summary["control"] else ""
    return f"{results}{legend}\n\n{stages}\n\n{_registration(summary)}\n"


def show(summary: Summary) -> None:
    """Print the tables to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 118, highlight=False)
    results = Table(
        box=box.SIMPLE_HEAD if terminal else box.ASCII2, title="Teacher beside student", title_justify="left"
    )
    results.add_column("")
    for column in ("teacher", "student", "student / teacher", CONTROL):
        results.add_column(column, justify="right")
    for row in result_rows(summary):
        results.add_row(*row)
    stages = Table(box=results.box, title="Stages", title_justify="left")
    stages.add_column("stage")
    for column in ("tokens", "trainable share", "seconds"):
        stages.add_column(column, justify="right")
    stages.add_column("this time")
    for entry in stage_rows(summary):
        stages.add_row(*entry)
    console.print(results)
    if summary["control"]:
        console.print(control_line(summary["control"]), markup=False, soft_wrap=True)
    console.print(stages)
    console.print(_registration(summary), markup=False)
    reused = [name for name, entry in summary["stages"].items() if entry["state"] != "ran"]
    if reused:
        console.print(f"Reused: {', '.join(reused)}.", markup=False)
    if summary.get("experiment"):
        console.print(f"DVC experiment: {summary['experiment']} (see `{_program('dvc')} exp show`).", markup=False)
    console.print("\nNext:")
    for label, command in NEXT.items():
        console.print(f"  {_program('lolcats')} {command}   # {label}", markup=False, soft_wrap=True)


def _program(name: str) -> str:
    """How a program of this environment is called from here."""
    folder = Path(sys.executable).parent
    return str(folder.relative_to(Path.cwd()) / name) if folder.is_relative_to(Path.cwd()) else name


def _registration(summary: Summary) -> str:
    registered = summary.get("registered")
    if not registered:
        return "Not registered."
    done = "Registered" if registered["created"] else "Already registered, reused"
    line = f"{done}: {registered['name']} version {registered['version']}, alias {registered['alias']}."
    gates = summary.get("gates")
    if not gates or gates["passed"] is None:
        return line
    if not gates["passed"]:
        return f"{line}\nGates: REFUSED. {gates['reasons']}"
    return f"{line}\nGates: passed; aliases now: {', '.join(gates['aliases'])}."

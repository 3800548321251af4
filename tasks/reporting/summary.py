"""The final table, teacher beside student, and the same numbers for machines in reports/summary.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from tasks.registry.promotion import Standing
from tasks.registry.register import RegisteredVersion
from tasks.versioning.dvc_graph import Reproduced

logger = logging.getLogger(__name__)
REPORT = Path("reports") / "summary.json"
STEPS = {
    "teacher": "teacher",
    "swapped": "swapped, without transfer",
    "transferred": "after attention transfer",
    "finetuned": "after low-rank finetuning",
}
REUSED = {"ran": "ran", "restored": "reused (DVC's run cache)", "unchanged": "reused (unchanged)"}


def build(
    root: Path,
    stages: Sequence[Reproduced],
    registered: RegisteredVersion | None = None,
    run_id: str | None = None,
    experiment: str | None = None,
    gates: Standing | None = None,
) -> dict[str, Any]:
    """Collect the numbers of a finished run from outputs/.

    Raises:
        UserError: a stage's result is missing or damaged.
    """
    evaluation = _read(root / "outputs" / "evaluate" / "evaluation.json")
    perplexity = evaluation.get("perplexity") or {}
    teacher = perplexity.get("teacher")
    return {
        "perplexity": perplexity,
        "perplexity_ratio": {k: v / teacher for k, v in perplexity.items() if k != "teacher"} if teacher else {},
        "recall": evaluation.get("recall") or {},
        "tasks": evaluation.get("tasks") or {},
        "lm_eval_version": evaluation.get("lm_eval_version"),
        "stages": {done.stage: _stage(root, done) for done in stages},
        "registered": None
        if registered is None
        else {
            "name": registered.name,
            "version": registered.version,
            "alias": registered.alias,
            "created": registered.created,
            "uri": registered.uri,
        },
        "gates": None if gates is None else asdict(gates),
        "mlflow_run_id": run_id,
        "experiment": experiment,
    }


def _stage(root: Path, done: Reproduced) -> dict[str, Any]:
    metrics = _read(root / "outputs" / done.stage / "metrics.json")
    entry: dict[str, Any] = {
        "state": done.state,
        "seconds": metrics.get("stage_seconds", metrics.get("seconds")),
        "wall_seconds": done.seconds,
    }
    for name in ("tokens", "trainable_parameters", "total_parameters"):
        if name in metrics:
            entry[name] = metrics[name]
    if entry.get("total_parameters") and "trainable_parameters" in entry:
        entry["trainable_share"] = entry["trainable_parameters"] / entry["total_parameters"]
    return entry


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `dvc repro`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove its directory and run `dvc repro`") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; remove its directory and run `dvc repro`")
    return value


def write(root: Path, summary: Mapping[str, Any]) -> Path:
    """Write reports/summary.json atomically."""
    write_json(root / REPORT, dict(summary))
    return root / REPORT


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The main results as flat metrics, for the parent run."""
    flat = {f"perplexity/{step}": float(value) for step, value in summary["perplexity"].items()}
    for side, gaps in summary["recall"].items():
        for gap, result in gaps.items():
            flat[f"recall/{side}/gap_{gap}"] = float(result["value"])
    for task, result in summary["tasks"].items():
        for side in ("teacher", "finetuned"):
            if isinstance(result.get(side), Mapping):
                flat[f"{task}/{side}"] = float(result[side]["value"])
    return flat


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the main table: what, teacher, student, student over teacher."""
    rows = []
    perplexity, ratio = summary["perplexity"], summary["perplexity_ratio"]
    for step, label in STEPS.items():
        if step not in perplexity:
            continue
        value = _number(perplexity[step])
        cells = (value, "", "") if step == "teacher" else ("", value, f"{_number(ratio.get(step))}x")
        rows.append((f"perplexity, {label}", *cells))
    if "bigram" in perplexity:
        rows.append(("perplexity, bigram model for scale", _number(perplexity["bigram"]), "", ""))
    recall = summary["recall"]
    student = recall.get("finetuned") or {}
    for gap, result in sorted((recall.get("teacher") or {}).items(), key=lambda entry: int(entry[0])):
        rows.append((f"copying recall at gap {gap}", _measured(result), _measured(student.get(gap)), ""))
    for task, result in summary["tasks"].items():
        label = f"{task} ({result.get('metric', 'acc')}, {result.get('items', '?')} items)"
        rows.append((label, _measured(result.get("teacher")), _measured(result.get("finetuned")), ""))
    return rows


def stage_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of the stage table: stage, tokens, trainable share, seconds, what became of it."""
    rows = []
    for name, entry in summary["stages"].items():
        tokens = f"{entry['tokens']:,.0f}" if entry.get("tokens") is not None else ""
        share = f"{100 * entry['trainable_share']:.2f} %" if "trainable_share" in entry else ""
        seconds = f"{entry['seconds']:.0f}" if entry.get("seconds") is not None else ""
        rows.append((name, tokens, share, seconds, REUSED[entry["state"]]))
    return rows


def next_commands(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to type next, with what it does."""
    return [
        ("runs, plots and the registry", ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"),
        ("the flow's runs", 'PREFECT_HOME="$PWD/.prefect" .venv/bin/prefect server start'),
        ("let the student write", '.venv/bin/lolcats generate "def "'),
        ("what a real model needs", ".venv/bin/lolcats doctor --preset llama3_1_8b"),
    ]


def markdown(summary: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["| | teacher | student | ratio |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in result_rows(summary)]
    lines += ["", "| stage | tokens | trainable | seconds | |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in stage_rows(summary)]
    lines += ["", _registration(summary)]
    return "\n".join(lines) + "\n"


def show(summary: Mapping[str, Any]) -> None:
    """Print the tables to standard output."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 100, highlight=False)
    results = Table(
        box=box.SIMPLE_HEAD if terminal else box.ASCII2, title="Teacher beside student", title_justify="left"
    )
    results.add_column("")
    for column in ("teacher", "student", "student / teacher"):
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
    console.print(stages)
    console.print(_registration(summary), markup=False)
    reused = [name for name, entry in summary["stages"].items() if entry["state"] != "ran"]
    if reused:
        console.print(f"Reused: {', '.join(reused)}.", markup=False)
    if summary.get("experiment"):
        console.print(f"DVC experiment: {summary['experiment']} (see `.venv/bin/dvc exp show`).", markup=False)
    console.print("\nNext:")
    for label, command in next_commands(summary):
        console.print(f"  {command}   # {label}", markup=False, soft_wrap=True)


def _registration(summary: Mapping[str, Any]) -> str:
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


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _measured(result: Any) -> str:
    if not isinstance(result, Mapping):
        return ""
    error = result.get("stderr")
    return f"{result['value']:.3f}" + (f" ± {error:.3f}" if error is not None else "")

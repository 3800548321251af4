"""`lolcats compare A B`: the measures of two evaluated students, with paired tests of their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from lolcats_common.files import read_json, read_json_lines
from lolcats_common.records import Evaluation, Measured
from lolcats_common.tables import number
from lolcats_core.evaluation.paired import paired_comparison
from tasks.registry.versions import version_files

CURRENT = "current"


@dataclass(frozen=True)
class Evaluated:
    """One side: its title, evaluation.json, and the folder of its sample logs."""

    title: str
    evaluation: Evaluation
    samples: Path


def load(root: Path, name: str, which: str) -> Evaluated:
    """The evaluation of the current outputs (``current``), of a directory, or of a registered version.

    Args:
        name: the registered model where `which` names none.
        which: ``current``, a directory with evaluation.json, or a version as `versions.version_files` takes it.

    Raises:
        UserError: there is no such version, or it was never evaluated.
    """
    if which == CURRENT:
        title, folder = "current outputs", root / "outputs" / "evaluate"
    elif Path(which).is_dir():
        title, folder = which, Path(which)
    else:
        version, folder = version_files(root, name, which)
        title = f"{version.name} version {version.version}"
    evaluation: Evaluation = read_json(folder / "evaluation.json", "run `dvc repro evaluate`")
    return Evaluated(title, evaluation, folder / "samples")


class Row(TypedDict):
    """One measure of both students; what needs paired items is not required."""

    measure: str
    first: float
    second: float
    difference: NotRequired[float]
    interval: NotRequired[list[float] | None]
    p_value: NotRequired[float]


class Compared(TypedDict):
    """Both titles, the common measures, and what could not be compared, with the reason."""

    first: str
    second: str
    rows: list[Row]
    notes: list[str]


def compare(first: Evaluated, second: Evaluated) -> Compared:
    """Everything that both were measured on; ``difference`` is second - first."""
    a, b = first.evaluation, second.evaluation
    rows: list[Row] = []
    notes: list[str] = []
    for step in ("teacher", "transferred", "finetuned"):
        if step in a["perplexity"] and step in b["perplexity"]:
            label = f"perplexity, {step}"
            rows.append({"measure": label, "first": a["perplexity"][step], "second": b["perplexity"][step]})
    if a.get("perplexity_tokens") != b.get("perplexity_tokens"):
        notes.append("perplexity was measured on different numbers of tokens")
    before, after = (evaluation["recall"].get("finetuned") or {} for evaluation in (a, b))
    for gap in sorted(before.keys() & after.keys(), key=int):
        label = f"copying recall at gap {gap}"
        rows.append({"measure": label, "first": before[gap]["value"], "second": after[gap]["value"]})
    for task in sorted(a["tasks"].keys() & b["tasks"].keys()):
        rows.append(_task(task, first, second, notes))
    for side, other in ((first, second), (second, first)):
        missing = sorted(side.evaluation["tasks"].keys() - other.evaluation["tasks"].keys())
        notes += [f"{task}: not measured on {other.title}" for task in missing]
    values = [_generation_and_audit(evaluation) for evaluation in (a, b)]
    for label, value in values[0].items():
        other_value = values[1][label]
        if value is not None and other_value is not None:
            rows.append({"measure": label, "first": value, "second": other_value})
    return {"first": first.title, "second": second.title, "rows": rows, "notes": notes}


def _generation_and_audit(evaluation: Evaluation) -> dict[str, float | None]:
    generation, audit = evaluation.get("generation", {}), evaluation.get("audit", {})
    return {
        "generation, exact prefix": _value(generation.get("exact_prefix")),
        "generation, token f1": _value(generation.get("token_f1")),
        "audit, linear off": audit.get("linear_off"),
        "audit, window off": audit.get("window_off"),
    }


def _value(result: Measured | None) -> float | None:
    return None if result is None else result["value"]


def _task(task: str, first: Evaluated, second: Evaluated, notes: list[str]) -> Row:
    a, b = first.evaluation["tasks"][task], second.evaluation["tasks"][task]
    row: Row = {
        "measure": f"{task} ({a['metric']})",
        "first": a["finetuned"]["value"],
        "second": b["finetuned"]["value"],
    }
    if "paired" not in a:  # a perplexity: its documents have losses, not scores
        return row
    hashes = [side.evaluation.get("task_hashes", {}).get(task) for side in (first, second)]
    if hashes[0] is None or hashes[0] != hashes[1]:
        notes.append(f"{task}: different questions, so the items cannot be paired")
        return row
    scores = [_scores(side.samples / f"{task}.jsonl") for side in (first, second)]
    if not scores[0] or not scores[1] or len(scores[0]) != len(scores[1]):
        notes.append(f"{task}: no sample log with a score per item on both sides")
        return row
    paired = paired_comparison(scores[0], scores[1])
    row["difference"], row["interval"] = paired["difference"], paired["interval"]
    if "p_value" in paired:
        row["p_value"] = paired["p_value"]
    return row


def _scores(path: Path) -> list[float]:
    """The student's score of each item; empty where the log is missing or holds none."""
    if not path.is_file():
        return []
    values = [item.get("finetuned") for item in read_json_lines(path, "run `dvc repro evaluate`")]
    return [] if None in values else values


def show(compared: Compared) -> None:
    """Print the comparison to standard output."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2)
    shown.add_column("student")
    for column in (f"A: {compared['first']}", f"B: {compared['second']}", "B - A", "95 %", "McNemar p"):
        shown.add_column(column, justify="right")
    for row in compared["rows"]:
        bounds = row.get("interval")
        shown.add_row(
            row["measure"],
            number(row["first"]),
            number(row["second"]),
            f"{row.get('difference', row['second'] - row['first']):+.3g}",
            f"{bounds[0]:+.3g} … {bounds[1]:+.3g}" if bounds else "",
            f"{row['p_value']:.3g}" if "p_value" in row else "",
        )
    console.print(shown)
    for note in compared["notes"]:
        console.print(f"Note: {note}.", markup=False)

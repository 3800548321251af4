"""`lolcats compare A B`: two evaluated students beside each other, task by task on the same items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError
from lolcats_core.evaluation.paired import paired_comparison
from tasks.registry import register

CURRENT = "current"


@dataclass(frozen=True)
class Evaluated:
    """One side: its title, evaluation.json, and the folder of its sample logs."""

    title: str
    evaluation: dict[str, Any]
    samples: Path


def load(root: Path, name: str, which: str) -> Evaluated:
    """The evaluation of the current outputs (``current``), of a directory, or of a registered version.

    Args:
        name: the registered model where `which` names none.
        which: ``current``, a directory with evaluation.json, or a version as `registry.version_files` takes it.

    Raises:
        UserError: there is no such version, or it was never evaluated.
    """
    if which == CURRENT:
        title, folder = "current outputs", root / "outputs" / "evaluate"
    elif Path(which).is_dir():
        title, folder = which, Path(which)
    else:
        version, folder = register.version_files(root, name, which)
        title = f"{version.name} version {version.version}"
    try:
        evaluation = dict(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{which}: no evaluation.json in {folder}; run `dvc repro evaluate`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'evaluation.json'} is damaged ({error})") from None
    return Evaluated(title, evaluation, folder / "samples")


def compare(first: Evaluated, second: Evaluated) -> dict[str, Any]:
    """Everything that both were measured on.

    Returns:
        ``rows``: one mapping per measure with ``measure``, ``first``, ``second`` and where items can be paired
        ``difference`` (second - first), ``interval`` and ``p_value``; ``notes``: what could not be compared, and why.
    """
    a, b = first.evaluation, second.evaluation
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for step in ("teacher", "transferred", "finetuned"):
        if step in a["perplexity"] and step in b["perplexity"]:
            label = f"perplexity, {step}"
            rows.append({"measure": label, "first": a["perplexity"][step], "second": b["perplexity"][step]})
    if a.get("perplexity_tokens") != b.get("perplexity_tokens"):
        notes.append("perplexity was measured on different numbers of tokens")
    gaps = _students(a["recall"]).keys() & _students(b["recall"]).keys()
    for gap in sorted(gaps, key=int):
        before, after = (_students(x["recall"])[gap]["value"] for x in (a, b))
        rows.append({"measure": f"copying recall at gap {gap}", "first": before, "second": after})
    for task in sorted(a["tasks"].keys() & b["tasks"].keys()):
        rows.append(_task(task, first, second, notes))
    for side, other in ((first, second), (second, first)):
        missing = sorted(side.evaluation["tasks"].keys() - other.evaluation["tasks"].keys())
        notes += [f"{task}: not measured on {other.title}" for task in missing]
    for section, names in (("generation", ("exact_prefix", "token_f1")), ("audit", ("linear_off", "window_off"))):
        for name in names:
            values = [x.get(section, {}).get(name) for x in (a, b)]
            if None not in values:
                first_value, second_value = (v["value"] if isinstance(v, Mapping) else v for v in values)
                label = f"{section}, {name.replace('_', ' ')}"
                rows.append({"measure": label, "first": first_value, "second": second_value})
    return {"first": first.title, "second": second.title, "rows": rows, "notes": notes}


def _students(recall: Mapping[str, Any]) -> Mapping[str, Any]:
    return recall.get("finetuned") or {}


def _task(task: str, first: Evaluated, second: Evaluated, notes: list[str]) -> dict[str, Any]:
    a, b = first.evaluation["tasks"][task], second.evaluation["tasks"][task]
    row = {
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
    return {**row, **{key: paired[key] for key in ("difference", "interval", "p_value") if key in paired}}


def _scores(path: Path) -> list[float]:
    """The student's score of each item; empty where the log is missing or holds none."""
    if not path.is_file():
        return []
    values = [json.loads(line).get("finetuned") for line in path.read_text(encoding="utf-8").splitlines()]
    return [] if None in values else values


def show(compared: Mapping[str, Any]) -> None:
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
        low, high = row.get("interval", (None, None))
        shown.add_row(
            row["measure"],
            *(f"{row[side]:.4g}" for side in ("first", "second")),
            f"{row.get('difference', row['second'] - row['first']):+.3g}",
            "" if low is None else f"{low:+.3g} … {high:+.3g}",
            "" if "p_value" not in row else f"{row['p_value']:.3g}",
        )
    console.print(shown)
    for note in compared["notes"]:
        console.print(f"Note: {note}.", markup=False)

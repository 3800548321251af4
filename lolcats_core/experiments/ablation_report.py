"""What the ablation found: the report, its table in the paper's form, and whether the published ordering holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.files import write_json, write_text
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import Params
from lolcats_common.tables import markdown_table, number
from lolcats_core.experiments.ablation import FEATURE_MAPS, WINDOWS, Budget, published_trial
from lolcats_core.experiments.controls import WINDOW
from lolcats_core.experiments.study import StudyContext

TITLES = {
    "lora_rank": "LoRA rank",
    "projections": "Projections with LoRA",
    "window_size": "Window size",
    "transfer_steps": "Steps of attention transfer",
    "softmax_layers": "Published recipe beside ours (the layers with the largest transfer error keep softmax)",
}


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, whether it holds here, and the numbers that say so."""

    text: str
    holds: bool
    numbers: str


def published_ordering(measured: Mapping[str, Mapping[str, Any]], base: LinearizeConfig) -> list[Claim]:
    """The orderings of the paper's ablation, held against the grid.

    Args:
        measured: rows by the label of the grid's trials (`ablation.trials`).

    Raises:
        KeyError: the grid is not complete.
    """

    def value(feature_map: str, window: str, transfer: bool, name: str = "after") -> float:
        label = f"{feature_map}, {window}, {base.k_map_per}, {'transfer' if transfer else 'no transfer'}"
        found = measured[label][name]
        return float("inf") if found is None else float(found)

    def claim(text: str, *pairs: tuple[float, float]) -> Claim:
        numbers = ", ".join(f"{low:.4g} < {high:.4g}" for low, high in pairs)
        return Claim(text, all(low < high for low, high in pairs), numbers)

    maps = FEATURE_MAPS
    return [
        claim(
            "attention transfer lowers perplexity before LoRA (published: 60.9 instead of 2448)",
            *((value(m, "none", True, "before"), value(m, "none", False, "before")) for m in maps),
        ),
        claim(
            "attention transfer lowers final perplexity at equal steps (published: hedgehog 3.90 < 9.02, t2r 4.11 < "
            "16.05)",
            *((value(m, "none", True), value(m, "none", False)) for m in maps),
        ),
        claim(
            "hedgehog is below t2r without and with transfer (published: 9.02 < 16.05, 3.90 < 4.11)",
            *((value("hedgehog", "none", t), value("t2r", "none", t)) for t in (False, True)),
        ),
        claim(
            "a softmax window lowers it further, terraced and sliding alike",
            *((value(m, w, True), value(m, "none", True)) for m in maps for w in WINDOWS[1:]),
        ),
    ]


def report_on(
    study: StudyContext, params: Params, budget: Budget, source: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that the table needs, as plain JSON values, with the teacher's own measurements.

    Args:
        source: the teacher's name.
        rows: of `ablation.run`.
    """
    grid = {row["label"]: row for row in rows if row["section"] == "grid"}
    base = published_trial(params, budget).linearize
    teacher = study.teacher_row
    return {
        "teacher": {
            "source": source,
            "parameters": sum(p.numel() for p in study.teacher.parameters()),
            "perplexity": teacher["perplexity"],
            "recall": teacher["recall"][str(budget.recall_gap)],
        },
        "budget": dataclasses.asdict(budget)
        | {"sequence_length": int(study.train_rows.sequence_length)}
        | {"transfer_lr": params.transfer.lr, "finetune_lr": params.finetune.lr},
        "rows": rows,
        "ordering": [dataclasses.asdict(claim) for claim in published_ordering(grid, base)] if grid else [],
        "hardware": device_tags(),
        "versions": versions(),
    }


def write_report(report: Mapping[str, Any], directory: Path) -> str:
    """Write `report` as ablation.json and ablation.md; returns the latter's text."""
    text = markdown(report)
    write_json(directory / "ablation.json", report)
    write_text(directory / "ablation.md", text)
    return text


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the paper's table, the one-dimensional sections, and what became of the ordering."""
    teacher, budget = report["teacher"], report["budget"]
    lines = [
        f"Teacher: {teacher['source']}, {teacher['parameters'] / 1e6:.1f}M parameters, perplexity "
        f"{number(teacher['perplexity'])}, recall {teacher['recall']:.3f}. Each stage: {budget['steps']} steps of "
        f"{budget['batch_size']} x {budget['sequence_length']} tokens at learning rates {budget['transfer_lr']:g} "
        f"and {budget['finetune_lr']:g}; without transfer, maps and LoRA together for both, at the latter. "
        f"Perplexity over {budget['eval_rows']} validation rows; {WINDOW}: that of one in the same bytes after the "
        f"same LoRA; recall: copying at gap {budget['recall_gap']}.",
        "",
    ]
    grid = {row["label"]: row for row in report["rows"] if row["section"] == "grid"}
    if grid:
        lines += [_grid_table(grid), ""]
    for section, title in TITLES.items():
        chosen = [row for row in report["rows"] if row["section"] == section]
        if chosen:
            cells = [(row["label"], *_perplexities(row), _control(row), _recall(row)) for row in chosen]
            lines += [markdown_table((title, "PPL before LoRA", "PPL", WINDOW, "recall"), cells), ""]
    lines += ordering_lines([Claim(**claim) for claim in report["ordering"]])
    return "\n".join(lines).rstrip() + "\n"


def _grid_table(grid: Mapping[str, Mapping[str, Any]]) -> str:
    """The paper's form: one line per attention, without transfer beside with it."""
    without = ("Swap & Finetune: PPL before LoRA", "PPL")
    transferred = ("+ Attention Transfer: PPL before LoRA", "PPL", WINDOW, "recall")
    rows = []
    for label, row in grid.items():
        name, _, kind = label.rpartition(", ")
        if kind == "transfer":
            cells = *_perplexities(grid[f"{name}, no transfer"]), *_perplexities(row), _control(row), _recall(row)
            rows.append((name, *cells))
    return markdown_table(("feature map, window, key maps per", *without, *transferred), rows)


def ordering_lines(claims: Sequence[Claim]) -> list[str]:
    """Whether the published ordering holds, statement by statement."""
    if not claims:
        return []
    kept = sum(claim.holds for claim in claims)
    verdict = "holds" if kept == len(claims) else f"does not hold in full ({kept} of {len(claims)} statements do)"
    lines = [f"The published ordering {verdict}:", ""]
    return lines + [f"- {'holds' if c.holds else 'DOES NOT HOLD'}: {c.text}: {c.numbers}" for c in claims]


def _perplexities(row: Mapping[str, Any]) -> tuple[str, str]:
    return number(row["before"], "diverged"), number(row["after"], "diverged")


def _control(row: Mapping[str, Any]) -> str:
    return number(row["control"], "-")


def _recall(row: Mapping[str, Any]) -> str:
    return "diverged" if row["recall"] is None else f"{row['recall']:.3f}"

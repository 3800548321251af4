"""`lolcats ablate`: the paper's ablation on the project's teacher and text, with its table and its ordering.

The rows share one process, one teacher in memory and, where their maps are the same, one attention transfer; each
finished row is kept, so that the same command continues a killed ablation. With a GPU nothing changes but the speed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lolcats_core import ablation
from lolcats_core.ablation import Budget, Claim, Row, Setting
from lolcats_core.data.rows import TokenRows
from lolcats_core.files import sha256_json, write_json, write_text
from lolcats_core.params import Params
from lolcats_core.runtime import resolve_device, resolve_dtype, seed_everything
from lolcats_core.teacher import load_teacher, load_tokenizer
from tasks import graph
from tasks.logs import quiet_progress_bars
from tasks.stage import scratch_key
from tasks.tracking import Run, device_tags, first_line, versions

logger = logging.getLogger(__name__)
NEEDED = ("teacher", "prepare")
REPORT = Path("reports") / "ablation"
TITLES = {
    "lora_rank": "LoRA rank",
    "projections": "Projections with LoRA",
    "window_size": "Window size",
    "transfer_steps": "Steps of attention transfer",
    "softmax_layers": "Published recipe beside ours (the layers with the largest transfer error keep softmax)",
}


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
        UserError: a stage failed, a section does not exist, or training diverged.
    """
    ablation.rows(params.linearize, params.finetune, budget, (), sections)  # refuse a wrong section at once
    for stage in NEEDED:
        graph.repro(stage, root, environment)
    store = store or root
    inputs = {"transfer": scratch_key("transfer", root, params), "finetune": dataclasses.asdict(params.finetune)}
    key = sha256_json(inputs)
    setting = _setting(root, params, budget, root / ".scratch" / "ablate" / f"{key[:16]}-{_slug(budget)}")
    sets = ablation.projections(setting.teacher, params.finetune.target_modules)
    rows = ablation.rows(params.linearize, params.finetune, budget, sets, sections)
    run = Run.start(store, "ablate", params=params, tags=device_tags())
    results: list[dict[str, Any]] = []
    try:
        if "softmax_layers" in sections:
            published = ablation.base_of(params.linearize, params.finetune, budget)
            errors = ablation.run_row(published, setting)["layer_errors"]
            rows += ablation.kept_rows(published, {int(layer): value for layer, value in errors.items()})
        for number, row in enumerate(rows, 1):
            logger.info("row %d of %d: %s, %s", number, len(rows), row.section, row.label)
            results.append(_result(row, ablation.run_row(row, setting)))
            if results[-1]["after"] is not None:
                run.log_metrics({f"{row.section}/{row.label}": results[-1]["after"]})
        report = _report(setting, params, budget, results)
        write_json(store / REPORT.with_suffix(".json"), report)
        write_text(store / REPORT.with_suffix(".md"), markdown(report))
        run.log_text(markdown(report), "ablation.md")
    except Exception as error:
        run.finish("FAILED", first_line(error))
        raise
    except BaseException:
        run.finish("KILLED")
        raise
    run.finish()
    return report


def _slug(budget: Budget) -> str:
    return "-".join(str(value) for value in dataclasses.astuple(budget))


def _setting(root: Path, params: Params, budget: Budget, scratch: Path) -> Setting:
    quiet_progress_bars()
    seed_everything(params.seed)
    device, dtype = resolve_device(params.compute.device), resolve_dtype(params.compute.precision)
    outputs = root / "outputs"
    tokenizer = load_tokenizer(outputs / "teacher")
    return Setting(
        teacher=load_teacher(outputs / "teacher", dtype=dtype, device=device),
        train_rows=TokenRows.open(outputs / "prepare" / "train"),
        validation_rows=TokenRows.open(outputs / "prepare" / "validation"),
        transfer=params.transfer,
        finetune=params.finetune,
        budget=budget,
        seed=params.seed,
        scratch=scratch,
        exclude_ids=tuple(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})),
    )


def _result(row: Row, measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "section": row.section,
        "label": row.label,
        "transfer_steps": row.transfer_steps,
        "lora_rank": row.lora_rank,
        "target_modules": list(row.target_modules),
        "linearize": row.linearize.to_dict(),
        **measured,
    }


def _report(setting: Setting, params: Params, budget: Budget, results: list[dict[str, Any]]) -> dict[str, Any]:
    grid = {row["label"]: row for row in results if row["section"] == "grid"}
    base = ablation.base_of(params.linearize, params.finetune, budget).linearize
    teacher = ablation.teacher_row(setting)
    return {
        "teacher": {
            "source": params.teacher.source,
            "parameters": sum(p.numel() for p in setting.teacher.parameters()),
            **teacher,
        },
        "budget": dataclasses.asdict(budget) | {"sequence_length": int(setting.train_rows.sequence_length)},
        "rows": results,
        "ordering": [dataclasses.asdict(claim) for claim in ablation.published_ordering(grid, base)] if grid else [],
        "hardware": device_tags(),
        "versions": versions(),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the paper's table, the one-dimensional sections, and what became of the ordering."""
    teacher, budget = report["teacher"], report["budget"]
    lines = [
        f"Teacher: {teacher['source']}, {teacher['parameters'] / 1e6:.1f}M parameters, perplexity "
        f"{_number(teacher['perplexity'])}, recall {teacher['recall']:.3f}. Each stage: {budget['steps']} steps of "
        f"{budget['batch_size']} x {budget['sequence_length']} tokens; without transfer, maps and LoRA together for "
        f"both. Perplexity over {budget['eval_rows']} validation rows; recall: copying at gap {budget['recall_gap']}.",
        "",
    ]
    grid = {row["label"]: row for row in report["rows"] if row["section"] == "grid"}
    if grid:
        lines += _grid_lines(grid)
    for section, title in TITLES.items():
        chosen = [row for row in report["rows"] if row["section"] == section]
        if chosen:
            lines += [f"| {title} | PPL before LoRA | PPL | recall |", "|---|---|---|---|"]
            lines += [f"| {row['label']} | {_cells(row)} | {row['recall']:.3f} |" for row in chosen]
            lines.append("")
    lines += ordering_lines([Claim(**claim) for claim in report["ordering"]])
    return "\n".join(lines).rstrip() + "\n"


def _grid_lines(grid: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The paper's form: one line per attention, without transfer beside with it."""
    lines = [
        "| feature map, window, key maps per | Swap & Finetune: PPL before LoRA | PPL "
        "| + Attention Transfer: PPL before LoRA | PPL | recall |",
        "|---|---|---|---|---|---|",
    ]
    for label in grid:
        name, _, kind = label.rpartition(", ")
        if kind == "transfer":
            without, row = grid[f"{name}, no transfer"], grid[label]
            lines.append(f"| {name} | {_cells(without)} | {_cells(row)} | {row['recall']:.3f} |")
    return [*lines, ""]


def ordering_lines(claims: Sequence[Claim]) -> list[str]:
    """Whether the published ordering holds, statement by statement."""
    if not claims:
        return []
    kept = sum(claim.holds for claim in claims)
    verdict = "holds" if kept == len(claims) else f"does not hold in full ({kept} of {len(claims)} statements do)"
    lines = [f"The published ordering {verdict}:", ""]
    return lines + [f"- {'holds' if c.holds else 'DOES NOT HOLD'}: {c.text}: {c.numbers}" for c in claims]


def _cells(row: Mapping[str, Any]) -> str:
    return f"{_number(row['before'])} | {_number(row['after'])}"


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

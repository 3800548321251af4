"""`lolcats frontier`: quality against the size of the cache, for the project's teacher and text.

One attention transfer serves every budget; each point chooses its softmax heads from it and, if asked, takes stage 2.
Finished points are kept, so the same command continues a killed one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_file, write_json, write_text
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import Params
from lolcats_common.tables import markdown_table, number
from lolcats_core.experiments.controls import WINDOW, window_perplexity
from lolcats_core.experiments.study import EvalSettings
from lolcats_core.experiments.trials import Trial, cache_budgets, run_trials
from lolcats_core.training.selection import budget_count
from tasks.studies.project import open_study

REPORT = Path("reports") / "frontier"
RATIOS = (0.0, 0.1, 0.25, 0.5)


def frontier(
    root: Path,
    params: Params,
    ratios: Sequence[float] = RATIOS,
    *,
    finetune: bool = True,
    environment: Mapping[str, str] | None = None,
    store: Path | None = None,
) -> dict[str, Any]:
    """Measure every budget and write reports/frontier.json, .md and .png.

    Args:
        root: checkout or worktree whose teacher and rows are used; brought up to date first.
        ratios: shares of the teacher's kv cache that keep softmax attention.
        finetune: also stage 2 at each of them.
        environment: of the stages, where `root` is a worktree.
        store: checkout that receives the reports; `root` by default.

    Raises:
        UserError: a stage failed, or a ratio does not fit the teacher.
    """
    if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
        raise UserError(f"`--ratio` must lie in [0, 1), got {', '.join(map(str, ratios)) or 'none'}")
    store = store or root
    settings = EvalSettings(
        batch_size=params.evaluate.batch_size,
        perplexity_rows=params.evaluate.max_perplexity_rows or 64,
        recall_gaps=params.evaluate.recall_gaps,
        recall_samples=params.evaluate.recall_samples,
        generation_prompts=params.evaluate.generation_prompts,
        generation_tokens=params.evaluate.generation_tokens,
        audit_rows=params.evaluate.audit_rows,
    )
    study = open_study(root, params, settings, environment)
    base = Trial.of("", params)
    points = cache_budgets(base if finetune else dataclasses.replace(base, finetune=None), ratios)
    for point in points:  # before anything is trained
        budget_count(point.select, point.linearize, study.teacher.config)
    report = {
        "teacher": {"source": params.teacher.source, **study.teacher_row},
        "criterion": params.select.criterion,
        "measures": dataclasses.asdict(settings),
        "points": run_trials(points, study),
        "hardware": device_tags(),
        "versions": versions(),
    }
    write_json(store / REPORT.with_suffix(".json"), report)
    write_text(store / REPORT.with_suffix(".md"), markdown(report))
    with atomic_file(store / REPORT.with_suffix(".png")) as partial:
        figure(report).savefig(partial, format="png", metadata={"Software": None})
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """A line per budget: what is kept, and each step's perplexity over the teacher's and recall."""
    teacher, steps = report["teacher"], _steps(report)
    gaps = sorted(teacher["recall"], key=int)
    titles = [f"PPL / teacher, {step}" for step in steps] + [f"{WINDOW}, {steps[-1]}"]
    titles += [f"recall {gap}, {step}" for step in steps for gap in gaps]
    recalls = ", ".join(f"{gap}: {teacher['recall'][gap]:.3f}" for gap in gaps)
    head = f"Teacher: {teacher['source']}, perplexity {number(teacher['perplexity'])}, recall {recalls}. "
    head += f"Softmax kept by {report['criterion'].replace('_', ' ')}. {WINDOW.capitalize()}: in place of the linear "
    head += "attention, in its bytes, after the same training."
    rows = []
    for point in report["points"]:
        measured = [point[step] for step in steps]
        cells = ["diverged" if m is None else f"{m['perplexity'] / teacher['perplexity']:.4f}" for m in measured]
        plain = window_perplexity(point, steps[-1])
        cells += ["-" if plain is None else f"{plain / teacher['perplexity']:.4f}"]
        cells += ["diverged" if m is None else f"{m['recall'][gap]:.3f}" for m in measured for gap in gaps]
        kept = point["selection"]
        chosen = ["-", "-"] if kept is None else [f"{kept['cache_ratio']:.1%}", _kept(kept["linearize"])]
        rows.append(chosen + cells)
    return f"{head}\n\n{markdown_table(('kv cache kept', 'softmax in', *titles), rows)}\n"


def _steps(report: Mapping[str, Any]) -> list[str]:
    return [step for step in ("transferred", "finetuned") if step in report["points"][0]]


def _kept(settings: Mapping[str, Any]) -> str:
    """Layers by their number, kv groups as layer.group."""
    names = [str(layer) for layer in settings["softmax_layers"]]
    names += [f"{layer}.{group}" for layer, groups in settings["softmax_heads"].items() for group in groups]
    return ", ".join(names) or "none"


def figure(report: Mapping[str, Any]) -> Figure:
    """Perplexity over the teacher's, and recall, against the share of the kv cache that is kept."""
    drawn = Figure(figsize=(9, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    teacher, steps = report["teacher"], _steps(report)
    for step in steps:
        left.plot(*_curve(report, step, lambda m: m["perplexity"] / teacher["perplexity"]), "o-", label=step)
    for gap, value in teacher["recall"].items():

        def recall(measured: Mapping[str, Any], gap: str = gap) -> float:
            return float(measured["recall"][gap])

        (line,) = right.plot(*_curve(report, steps[-1], recall), "o-", label=f"gap {gap}")
        right.axhline(value, linestyle=":", color=line.get_color())
    left.axhline(1.0, linestyle=":", color="grey")
    left.set(xlabel="share of the kv cache kept", ylabel="perplexity / teacher", title="Perplexity")
    right.set(xlabel="share of the kv cache kept", ylabel="recall (dotted: teacher)", title="Copying recall")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn


def _curve(
    report: Mapping[str, Any], step: str, value: Callable[[Mapping[str, Any]], float]
) -> tuple[list[float], list[float]]:
    """Cache ratios and values of a step's measurements; NaN, a gap in the line, where a point diverged."""
    points = report["points"]
    x = [math.nan if point["selection"] is None else point["selection"]["cache_ratio"] for point in points]
    return x, [math.nan if point[step] is None else value(point[step]) for point in points]

"""`lolcats frontier`: quality against the size of the cache, for the project's teacher and text.

One attention transfer serves every budget; each point chooses its softmax heads from it and, if asked, takes stage 2.
Finished points are kept, so the same command continues a killed one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_file, write_json, write_text
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import Params
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.data.rows import TokenRows
from lolcats_core.evaluation.recall import special_ids
from lolcats_core.experiments.recipes import Bench, Measures, Recipe, budgets, exclude_ids, run
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.selection import budget_count
from tasks.runner.logs import quiet_progress_bars
from tasks.versioning import dvc_graph

logger = logging.getLogger(__name__)
NEEDED = ("teacher", "prepare")
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
        UserError: a stage failed, a ratio does not fit the teacher, or training diverged.
    """
    if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
        raise UserError(f"`--ratio` must lie in [0, 1), got {', '.join(map(str, ratios)) or 'none'}")
    for stage in NEEDED:
        dvc_graph.repro(stage, root, environment)
    quiet_progress_bars()
    store, outputs = store or root, root / "outputs"
    source = Teacher.open(outputs / "teacher")
    tokenizer = source.tokenizer()
    device, dtype = resolve_device(params.compute.device), resolve_dtype(params.compute.precision)
    teacher = source.load(dtype, device)
    measures = Measures(
        batch_size=params.evaluate.batch_size,
        perplexity_rows=params.evaluate.max_perplexity_rows or 64,
        recall_gaps=params.evaluate.recall_gaps,
        recall_samples=params.evaluate.recall_samples,
        generation_prompts=params.evaluate.generation_prompts,
        generation_tokens=params.evaluate.generation_tokens,
        audit_rows=params.evaluate.audit_rows,
    )
    folder = root / ".scratch" / "frontier"
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = (TokenRows.open(outputs / "prepare" / name) for name in ("train", "validation"))
    bench = Bench(teacher, train, validation, measures, folder, exclude_ids(teacher.config, special_ids(tokenizer)))
    points = budgets(Recipe("", params), ratios)
    for point in points:  # before anything is trained
        budget_count(point.params.select, point.params.linearize, teacher.config)
    rows = []
    for number, point in enumerate(points, 1):
        logger.info("point %d of %d: cache ratio %s", number, len(points), point.name)
        rows.append(run(point, bench, params.seed, finetune=finetune))
    report = {
        "teacher": {"source": params.teacher.source, **bench.teacher_row},
        "criterion": params.select.criterion,
        "measures": dataclasses.asdict(measures),
        "points": rows,
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
    gaps = list(teacher["recall"])
    titles = [f"PPL / teacher, {step}" for step in steps] + [f"recall {gap}, {step}" for step in steps for gap in gaps]
    lines = [
        f"Teacher: {teacher['source']}, perplexity {teacher['perplexity']:.4g}, recall "
        f"{', '.join(f'{gap}: {value:.3f}' for gap, value in teacher['recall'].items())}. Softmax kept by "
        f"{report['criterion'].replace('_', ' ')}.",
        "",
        f"| kv cache kept | softmax in | {' | '.join(titles)} |",
        "|" + "---|" * (2 + len(titles)),
    ]
    for point in report["points"]:
        cells = [_number(point[step]["perplexity"], teacher["perplexity"]) for step in steps]
        cells += [f"{point[step]['recall'][gap]:.3f}" for step in steps for gap in gaps]
        kept = point["selection"]
        lines.append(f"| {kept['cache_ratio']:.1%} | {_kept(kept['linearize'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _steps(report: Mapping[str, Any]) -> list[str]:
    return [step for step in ("transferred", "finetuned") if step in report["points"][0]]


def _number(value: float | None, teacher: float) -> str:
    return "diverged" if value is None else f"{value / teacher:.4f}"


def _kept(settings: Mapping[str, Any]) -> str:
    """Layers by their number, kv groups as layer.group."""
    names = [str(layer) for layer in settings["softmax_layers"]]
    names += [f"{layer}.{group}" for layer, groups in settings["softmax_heads"].items() for group in groups]
    return ", ".join(names) or "none"


def figure(report: Mapping[str, Any]) -> Figure:
    """Perplexity over the teacher's, and recall, against the share of the kv cache that is kept."""
    drawn = Figure(figsize=(9, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    teacher, points = report["teacher"], report["points"]
    x = [point["selection"]["cache_ratio"] for point in points]
    for step in _steps(report):
        losses = [point[step]["perplexity"] for point in points]
        y = [float("nan") if value is None else value / teacher["perplexity"] for value in losses]
        left.plot(x, y, "o-", label=step)
    for gap, value in teacher["recall"].items():
        recalls = [point[_steps(report)[-1]]["recall"][gap] for point in points]
        (line,) = right.plot(x, recalls, "o-", label=f"gap {gap}")
        right.axhline(value, linestyle=":", color=line.get_color())
    left.axhline(1.0, linestyle=":", color="grey")
    left.set(xlabel="share of the kv cache kept", ylabel="perplexity / teacher", title="Perplexity")
    right.set(xlabel="share of the kv cache kept", ylabel="recall (dotted: teacher)", title="Copying recall")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn

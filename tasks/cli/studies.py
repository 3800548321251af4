"""The commands that compare students: compare, ablate, frontier."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from lolcats_common.params import load_params, read_assignments
from lolcats_common.project import find_root
from tasks.cli.options import Overrides, Preset
from tasks.runner.logs import setup_logging
from tasks.versioning import worktrees

app = typer.Typer()


@app.command()
def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A version (3, candidate, name@alias), current, or a directory.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="As A; the champion by default.")] = "champion",
) -> None:
    """Put two evaluated students side by side; tasks are paired item by item, so that noise shows as noise."""
    setup_logging(logging.WARNING)
    root = find_root()
    name = load_params(root / "params.yaml").register.name
    from tasks.studies import compare as study

    study.show(study.compare(study.load(root, name, first), study.load(root, name, second)))


@app.command()
def ablate(
    preset: Preset = None,
    set: Overrides = None,
    section: Annotated[
        list[str] | None,
        typer.Option(help="grid, lora_rank, projections, window_size, transfer_steps, softmax_layers; all by default."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each stage of each row.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    eval_rows: Annotated[int, typer.Option(min=1, help="Validation rows that perplexity is measured on.")] = 12,
) -> None:
    """Run the paper's ablation on the project's teacher and say whether its ordering holds; continues where it was.

    An hour on two cores for the demo's teacher. A larger one needs a GPU and more --steps.
    """
    setup_logging()
    root = find_root()
    work = worktrees.workplace(root, preset, read_assignments(set or []))
    from lolcats_core.experiments.ablation import SECTIONS, Budget
    from lolcats_core.experiments.ablation_report import markdown
    from tasks.studies import ablate as study

    budget = Budget(steps=steps, batch_size=batch_size, eval_rows=eval_rows)
    report = study.ablate(work.root, work.params, budget, section or SECTIONS, work.environment, store=root)
    print(f"\n{markdown(report)}\nWritten to reports/ablation.md and reports/ablation.json.")


@app.command()
def frontier(
    preset: Preset = None,
    set: Overrides = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of the kv cache that stays; 0, 0.1, 0.25 and 0.5 by default.")
    ] = None,
    finetune: Annotated[bool, typer.Option(help="Stage 2 at each of them as well.")] = True,
) -> None:
    """Measure perplexity and recall against the size of the cache; continues where it was."""
    setup_logging()
    root = find_root()
    work = worktrees.workplace(root, preset, read_assignments(set or []))
    from tasks.studies import frontier as study

    ratios = ratio or study.RATIOS
    report = study.frontier(work.root, work.params, ratios, finetune=finetune, environment=work.environment, store=root)
    print(f"\n{study.markdown(report)}\nWritten to reports/frontier.md, .json and .png.")

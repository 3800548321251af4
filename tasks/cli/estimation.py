"""The commands before a run: doctor, plan, and the built-in teacher's pretraining."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lolcats_common.errors import UserError
from tasks.cli.options import Overrides, Preset, asked
from tasks.runner.logs import setup_logging

app = typer.Typer()
COLOURS = {"ok": "green", "info": "cyan", "warn": "yellow", "missing": "red"}


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


@app.command()
def doctor(preset: Preset = None, set: Overrides = None) -> None:
    """Say what a run will need (memory, disk, time, access) and what is missing; exit code 1 if something is."""
    setup_logging(logging.WARNING)
    root, params = asked(preset, set)
    from lolcats_core.estimation import doctor as doctors

    findings = doctors.doctor(params, root)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for finding in findings:
        table.add_row(f"[{COLOURS[finding.status]}]{finding.status}[/]", finding.name, finding.detail)
    _print(table)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    preset: Preset = None,
    tokens: Annotated[str, typer.Option(help="Trained in each stage, all epochs together, such as 20M.")] = "20M",
    gpus: Annotated[str, typer.Option(help="Such as 1xh200 or 8xh100.")] = "1xh200",
    set: Overrides = None,
) -> None:
    """Memory, disk and hours of each way to run both training stages, and the best on these GPUs."""
    setup_logging(logging.WARNING)
    root, params = asked(preset, set)
    from lolcats_core.estimation import cost as costs
    from lolcats_core.estimation.doctor import GIB, duration, model_shape

    shape = model_shape(params, root)
    if shape is None:
        raise UserError(f"the shape of {params.teacher.source} is unknown until its config.json can be read")
    count, kind = costs.parse_gpus(gpus)
    columns = ("stage", "mode", "GiB per GPU", "GiB of memory", "GiB of disk", "time", "")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for choice in costs.plan(params, shape, costs.parse_tokens(tokens), count, kind):
        sizes = (f"{size / GIB:,.1f}" for size in (choice.memory, choice.host, choice.disk))
        note = "best" if choice.best else "" if choice.fits else "does not fit"
        table.add_row(choice.stage, choice.mode, *sizes, duration(choice.seconds), note)
    _print(table)
    known = costs.GPUS[kind]
    source = "measured" if known.measured else "70 % of the datasheet's, not measured"
    print(f"{kind}: {known.rate / 1e12:.0f} TFLOP/s ({source}); estimates, see docs/scale.md")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Pretrain the built-in teacher (`lolcats teacher --help` lists the options).",
)
def teacher(context: typer.Context) -> None:
    setup_logging()
    from lolcats_core.pretraining.pretrain import main as pretrain

    raise typer.Exit(pretrain(context.args))

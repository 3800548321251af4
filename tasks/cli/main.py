"""The command line `lolcats`: running the pipeline and its state; the other commands stand beside, by subject.

Only what is light stands at the top of these modules. A command imports torch, MLflow or a stage's code inside itself,
so that ``--help`` and wrong parameters are answered at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from lolcats_common.errors import UserError
from lolcats_common.params import load_params, read_yaml
from lolcats_common.project import find_root
from lolcats_common.sources import check_sources
from tasks.cli import estimation, model, project, registry, studies
from tasks.cli.options import Overrides, Preset, changed_params
from tasks.cli.reasons import planned, short
from tasks.runner.exits import raise_terminated, run_and_report
from tasks.runner.logs import setup_logging
from tasks.runner.processes import supervise
from tasks.runner.store import read_overview
from tasks.versioning import dvc_graph, package


class Program(TyperGroup):
    """Runs a command so that an error of the user's is one line and exit code 1, SIGTERM is 143 and Ctrl-C 130."""

    def invoke(self, context: Any) -> None:
        """Run the command that `context` names."""
        signal.signal(signal.SIGTERM, raise_terminated)
        if code := run_and_report(lambda: super(Program, self).invoke(context), "lolcats"):
            raise typer.Exit(code)


app = typer.Typer(
    name="lolcats",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lolcats {package.version()}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Linearize pretrained transformers with LoLCATs: a tracked, resumable pipeline."""


@app.command()
def run(
    preset: Preset = None,
    set: Overrides = None,
    register: Annotated[bool, typer.Option(help="Register the finetuned model in MLflow.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which stages would run and why, and run none.")
    ] = False,
) -> None:
    """Run the whole pipeline; what has not changed is reused.

    Without --preset and --set it runs params.yaml here; with them, in a worktree of its own as a DVC experiment.
    """
    root = find_root()
    params = changed_params(root, preset, set)
    check_sources(params, root)  # what is wrong is refused before anything starts
    if dry_run:
        Console(width=None if sys.stdout.isatty() else 80, highlight=False).print(_stages(root, planned(root, params)))
        return
    print(
        "Checking the parameters against the teacher; the first stage begins in about 15 s.",
        file=sys.stderr,
        flush=True,
    )
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"):
        os.environ.setdefault(name, "CRITICAL")  # the flow says errors once, in one line
    options = [] if preset is None else ["--preset", preset]
    options += [part for entry in set or [] for part in ("--set", entry)]
    options += [] if register else ["--no-register"]
    raise typer.Exit(supervise([sys.executable, "-m", "flows.linearize", *options]))


@app.command(hidden=True)
def stage(name: str) -> None:
    """Run one stage of dvc.yaml here; `dvc repro` calls this in a project that `lolcats init` made."""
    if name not in (known := read_yaml(find_root() / "dvc.yaml").get("stages") or {}):
        raise UserError(f"dvc.yaml has no stage {name!r}; its stages: {', '.join(known)}")
    os.execv(sys.executable, [sys.executable, "-m", f"tasks.{name}"])


@app.command()
def status(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name every file that changed.")] = False,
) -> None:
    """Show each stage's state, the newest runs and the registered versions."""
    setup_logging(logging.WARNING)
    root = find_root()
    params = load_params(root / "params.yaml")
    changed = dvc_graph.changed(root)
    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False)
    stages = _stages(root, changed if verbose else {name: [short(reasons)] for name, reasons in changed.items()})
    runs = _table("Newest runs", "run", "status", "started", "id")
    overview = read_overview(root)
    for found in overview.runs:
        runs.add_row(found.name, found.status, _moment(found.started), found.id[:8])
    versions = _table("Registered", "model", "version", "alias", "created")
    for version, aliases in overview.newest_versions():
        versions.add_row(version.model, version.number, aliases, _moment(version.created))
    console.print(stages)
    console.print(runs)
    console.print(versions if versions.row_count else f"{params.register.name} is not registered yet.")


def _stages(root: Path, changed: Mapping[str, list[str]]) -> Table:
    """Every stage of dvc.yaml: whether it would run, and why."""
    table = _table("Stages", "stage", "state", "why")
    for name in read_yaml(root / "dvc.yaml").get("stages") or {}:
        table.add_row(name, "would run" if name in changed else "up to date", "; ".join(changed.get(name, [])))
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


for commands in (project, model, registry, studies, estimation):
    app.add_typer(commands.app)


def main() -> None:
    """Entry point of the program `lolcats`."""
    app()


if __name__ == "__main__":
    main()

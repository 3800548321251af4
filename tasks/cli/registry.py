"""The commands about registered versions: register, gates, promote, rollback, lineage, gc."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from lolcats_common.params import Params, load_params
from lolcats_common.project import find_root
from tasks.runner.logs import setup_logging

app = typer.Typer()
Version = Annotated[str, typer.Argument(help="A number or an alias (challenger), alone or as name/3, name@challenger.")]


def _project(level: int = logging.WARNING) -> tuple[Path, Params]:
    """The project's root and its parameters."""
    setup_logging(level)
    root = find_root()
    return root, load_params(root / "params.yaml")


@app.command("register")
def register_command() -> None:
    """Register outputs/finetune/model in MLflow unless this very model is registered already."""
    root, params = _project(logging.INFO)
    from tasks.registry.register import register

    done = register(root, params)
    print(f"{done.name} version {done.version}, alias {done.alias}" + ("" if done.created else " (already registered)"))


@app.command()
def gates(version: Version = "candidate") -> None:
    """Run the gates of params.yaml on a version; one that passes becomes the challenger. Exit code 1 if refused."""
    root, params = _project()
    from tasks.registry.promotion import run_gates

    report, _ = run_gates(root, params.register.name, params.gates, version)
    print(report.markdown())
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def promote(version: Version = "challenger") -> None:
    """Make a version that passed its gates the champion; the champion becomes the previous one."""
    root, params = _project()
    from tasks.registry import promotion

    status = promotion.promote(root, params.register.name, version)
    print(f"{params.register.name} version {status.version} is the champion.")


@app.command()
def rollback() -> None:
    """Let the previous champion serve again; its files are compared with what was registered first."""
    root, params = _project()
    from tasks.registry import promotion

    serving, before = promotion.rollback(root, params.register.name)
    print(f"{params.register.name} version {serving} is the champion again, version {before} the previous one.")


@app.command()
def lineage(
    version: Version,
    everything: Annotated[bool, typer.Option("--all", help="Hashes, runs, versions and every parameter, too.")] = False,
) -> None:
    """Show where a version comes from, and how to get its code and its bytes back."""
    root, params = _project()
    from tasks.registry import lineage as lineages

    print(lineages.lineage(root, params.register.name, version, everything))


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, it is only listed.")] = False,
) -> None:
    """List what no checkout, branch, tag, experiment or registered version points at, and remove it with --delete."""
    root, _ = _project()
    from tasks.versioning.garbage import collect

    found = collect(root, delete)
    for path in found.objects:
        print(f"  {path}")
    for model in found.models:
        print(f"  logged model {model}")
    what = f"{len(found.objects)} objects of DVC's cache and {len(found.models)} logged models"
    print(f"{'Removed' if delete else 'Nothing points at'} {what}, {found.bytes / 2**20:.1f} MiB.")
    if not delete and (found.objects or found.models):
        print("Nothing was removed; `lolcats gc --delete` does it.")

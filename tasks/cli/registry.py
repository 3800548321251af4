"""The commands of `lolcats` about registered versions: gates, promote, rollback, lineage, gc."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tasks.runner.logs import setup_logging

Version = Annotated[str, typer.Argument(help="A number, or an alias such as challenger.")]


def add_to(app: typer.Typer, guard: Callable[[Any], Any]) -> None:
    """Add the commands to `app`; `guard` turns their errors into one line."""
    for command in (gates, promote, rollback, lineage, gc):
        app.command()(guard(command))


def _registered() -> tuple[Any, Any]:
    """The project and its parameters."""
    setup_logging(logging.WARNING)
    from lolcats_common.params import load_params
    from lolcats_common.project import find_root

    root = find_root()

    return root, load_params(root / "params.yaml")


def gates(version: Version = "candidate") -> None:
    """Run the gates of params.yaml on a version; one that passes becomes the challenger. Exit code 1 if refused."""
    root, params = _registered()
    from tasks.registry.promotion import run_gates

    report, _ = run_gates(root, params.register.name, params.gates, version)
    print(report.markdown())
    if not report.passed:
        raise typer.Exit(1)


def promote(version: Version = "challenger") -> None:
    """Make a version that passed its gates the champion; the champion becomes the previous one."""
    root, params = _registered()
    from tasks.registry.promotion import promote as move

    print(f"{params.register.name} version {move(root, params.register.name, version).version} is the champion.")


def rollback() -> None:
    """Let the previous champion serve again; its files are compared with what was registered first."""
    root, params = _registered()
    from tasks.registry.promotion import rollback as move

    serving, before = move(root, params.register.name)
    print(f"{params.register.name} version {serving} is the champion again, version {before} the previous one.")


def lineage(version: Version) -> None:
    """Show where a version comes from, and how to get its code and its bytes back."""
    root, params = _registered()
    from tasks.registry.lineage import lineage as trace

    print(trace(root, params.register.name, version))


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, it is only listed.")] = False,
) -> None:
    """List what no checkout, branch, tag, experiment or registered version points at, and remove it with --delete."""
    root, _ = _registered()
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

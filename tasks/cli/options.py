"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats_common.errors import UserError
from lolcats_common.params import Params, read_assignments, read_yaml
from lolcats_common.project import HOME, find_root
from tasks.versioning import worktrees

Preset = Annotated[str | None, typer.Option(help="Name of a known model's preset, laid over params.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One parameter, such as transfer.lr=0.005.")
]


def asked(preset: str | None, overrides: list[str] | None) -> tuple[Path, Params]:
    """The project's root with its changed parameters; outside a project this directory, and the packaged params.yaml.

    Raises:
        ParamsError: as `changed_params`.
    """
    try:
        root = find_root()
    except UserError:
        laid_over = worktrees.overrides(preset, read_assignments(overrides or []))
        return Path.cwd(), worktrees.overridden(Path.cwd(), read_yaml(HOME / "params.yaml"), laid_over)[1]
    return root, changed_params(root, preset, overrides)


def changed_params(root: Path, preset: str | None, overrides: list[str] | None) -> Params:
    """params.yaml with the preset and the overrides laid over it.

    Raises:
        ParamsError: there is no such preset, or a parameter is unknown, ill-typed or out of range.
    """
    laid_over = worktrees.overrides(preset, read_assignments(overrides or []))
    return worktrees.overridden(root, read_yaml(root / "params.yaml"), laid_over)[1]

"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats_common.params import Params, load_params, read_assignments, read_yaml
from tasks.versioning import worktrees

Preset = Annotated[str | None, typer.Option(help="Name of a preset in presets/, laid over params.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One parameter, such as transfer.lr=0.005.")
]


def changed_params(root: Path, preset: str | None, overrides: list[str] | None) -> Params:
    """params.yaml with the preset and the overrides laid over it.

    Raises:
        ParamsError: there is no such preset, or a parameter is unknown, ill-typed or out of range.
    """
    laid_over = worktrees.overrides(preset, read_assignments(overrides or []))
    return worktrees.overridden(root, read_yaml(root / "params.yaml"), laid_over)[1]


def workplace(root: Path, preset: str | None, overrides: list[str] | None) -> tuple[Path, Params, dict[str, str]]:
    """Checkout, parameters and environment of a command's stages: a worktree of its own where anything is overridden.

    Raises:
        UserError: the overrides are wrong, or the project is no git checkout with a commit.
    """
    values = read_assignments(overrides or [])
    if preset is None and not values:
        return root, load_params(root / "params.yaml"), {}
    worktree = worktrees.prepare(root, preset, values)
    return worktree.root, worktree.params, worktree.environment

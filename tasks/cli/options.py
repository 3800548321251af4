"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats_common.params import Params, read_assignments, read_yaml
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

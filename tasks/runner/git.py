"""Git as this project calls it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lolcats_common.errors import UserError

# What a run's own commit holds (`tasks.versioning.lock_commits`).
KEPT = ("dvc.lock", "params.yaml", "package.yaml")
IDENTITY = {"NAME": "lolcats", "EMAIL": "lolcats@localhost"}


def git(root: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Standard output of a git command.

    Raises:
        UserError: it failed; the message is git's last line.
    """
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"`git {' '.join(arguments)}` failed: {lines[-1] if lines else done.returncode}")
    return done.stdout.strip()


def identity(root: Path) -> dict[str, str]:
    """Environment with a name for commits where the machine has none."""
    try:
        git(root, "config", "user.email")
        git(root, "config", "user.name")
    except UserError:
        return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in IDENTITY.items()}
    return {}


def git_state(root: Path, besides: Sequence[str] = KEPT) -> tuple[str, bool]:
    """Commit of the checkout, and whether other tracked files than `besides` differ; ``("unknown", True)`` outside git.

    By default `besides` are the files that a run's own commit keeps.
    """
    excluded = [f":(exclude){name}" for name in besides]
    try:
        commit = git(root, "rev-parse", "HEAD")
        changes = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    except (OSError, UserError):
        return "unknown", True
    return commit, bool(changes)

"""The origin of a registered version, and the two commands that bring its code and its bytes back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from tasks.registry.versions import GATES_TAG, REASONS_TAG, find_version, stored_model
from tasks.runner.mlflow_run import connect

GROUPS = {
    "code": ("git.", "lock."),
    "teacher and text": ("teacher.", "data."),
    "hashes": ("model.", "dvc.md5."),
    "runs": ("run.",),
    "versions": ("version.", "lm_eval."),
    "machine": ("cpu", "cores", "gpu", "gpus", "cuda"),
}


# What fits one look; the rest is for `--all`.
SHORT = ("code", "teacher and text")


def lineage(root: Path, name: str, which: str, everything: bool = False) -> str:
    """The page that `lolcats lineage` prints for a version: a number or an alias.

    Args:
        everything: hashes, runs, library versions, the machine and all parameters as well.

    Raises:
        Unavailable: the registry cannot be used.
        UserError: there is no such version, or its files are gone.
    """
    client = connect(root)
    version = find_version(client, name, which)
    tags = dict(version.tags)
    gates, reasons = tags.pop(GATES_TAG, "not examined"), tags.pop(REASONS_TAG, "")
    lines = [f"{name} version {version.version}  ({', '.join(sorted(version.aliases)) or 'no alias'})"]
    lines.append(f"  gates: {gates}{f' ({reasons})' if gates == 'refused' else ''}")
    lines.append(f"  MLflow run: {version.run_id}")
    for title, prefixes in GROUPS.items():
        found = {key: tags.pop(key) for key in sorted(tags) if key.startswith(prefixes)}
        if found and (everything or title in SHORT):
            lines += ["", title, *(f"  {key:<28} {value}" for key, value in found.items())]
    if tags:
        lines += ["", "results", *(f"  {key:<28} {value}" for key, value in sorted(tags.items()))]
    with stored_model(client, version) as stored:  # whose files are held against their manifest
        params = (stored / "artifacts" / "params.yaml").read_text(encoding="utf-8")
    if everything:
        lines += ["", "params.yaml", *(f"  {line}" for line in params.splitlines() if line.strip())]
    return "\n".join([*lines, "", *_commands(root, name, str(version.version), version.tags)])


def _commands(root: Path, name: str, number: str, tags: Mapping[str, str]) -> list[str]:
    commit = tags.get("lock.commit")
    if not commit:
        return ["It was registered outside a git checkout: the registry holds its model, nothing leads to its stages."]
    place, here = shlex.quote(str(root.parent / f"{name}-{number}")), shlex.quote(str(root))
    lines = ["Back to its code and its bytes:"]
    lines.append(f"  git -C {here} worktree add --detach {place} {commit}")
    lines.append(f"  dvc get {here} outputs --rev {commit} --out {place}/outputs")
    if tags.get("git.dirty") == "true":
        lines.append("The checkout had uncommitted changes besides parameters when it was made; no commit holds them.")
    return lines

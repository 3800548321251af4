"""Runs with overridden parameters: a git worktree each, so that the developer's own checkout stays as it is.

The worktree lies under .worktrees/, holds HEAD with the overrides written into its params.yaml, shares DVC's cache and
the MLflow store with the main checkout, and its result is saved as a DVC experiment that `dvc exp show` lists there.
"""

from __future__ import annotations

import logging
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from configobj import ConfigObj

from lolcats_common.errors import ParamsError, UserError
from lolcats_common.files import sha256_json, write_text
from lolcats_common.params import Params, apply_overrides, load_params, params_from_dict, read_preset, read_yaml
from lolcats_common.sources import BUILTIN, check_sources, is_glob, source_path
from tasks.runner.git import git, git_state, identity
from tasks.runner.mlflow_run import tracking_uri
from tasks.runner.stage import RESULTS_VARIABLE
from tasks.versioning import dvc_graph, package

logger = logging.getLogger(__name__)
# A DVC remote's settings that may be paths.
PATHS = {
    "cert_path",
    "configpath",
    "credentialpath",
    "gdrive_service_account_json_file_path",
    "gdrive_user_credentials_file",
    "key_path",
    "keyfile",
    "url",
}


@dataclass(frozen=True)
class Worktree:
    """Where a run works. `name`: its DVC experiment's, None in the main checkout. `environment`: for its stages.

    `label`: the preset and the overrides, for people; empty where there are none.
    """

    name: str | None
    root: Path
    params: Params
    environment: dict[str, str]
    label: str = ""


def overrides(preset: str | None, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The preset with `values` laid over it; nested.

    Raises:
        ParamsError: no preset has that name, or `values` is no mapping.
    """
    if values is not None and not isinstance(values, Mapping):
        raise ParamsError(f"`set` must be a mapping of keys to values, got {type(values).__name__}")
    return apply_overrides(read_preset(preset) if preset else {}, dict(values or {}))


def label(preset: str | None, values: Mapping[str, Any] | None) -> str:
    """A preset and overrides in one line, such as ``llama3_1_8b transfer.lr=0.005``; at most 120 characters."""

    def flat(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flat(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield f"{prefix}={value}"

    return textwrap.shorten(
        " ".join([*([str(preset)] if preset else []), *flat("", values or {})]), 120, placeholder=" …"
    )


def overridden(root: Path, base: dict[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], Params]:
    """`base` with `values` laid over it, plain and checked; local paths are taken from `root` and made absolute.

    Raises:
        ParamsError: a key is unknown, ill-typed or out of range.
    """
    named = "params.yaml with the overrides"
    merged = apply_overrides(base, dict(values))
    params = params_from_dict(merged, source=named)
    found = {"teacher.source": params.teacher.source, "data.source": params.data.source}
    merged = apply_overrides(merged, {key: _absolute(root, source) for key, source in found.items()})
    return merged, params_from_dict(merged, source=named)


def _absolute(root: Path, source: str) -> str:
    """A path of the main checkout as an absolute one; anything else (``builtin``, a hub id) as it is."""
    if source == BUILTIN:
        return source
    path = source_path(source, root)
    local = source.startswith((".", "~", "/")) or is_glob(source) or path.exists()
    return str(path) if local else source


def workplace(root: Path, preset: str | None, values: Mapping[str, Any] | None) -> Worktree:
    """Where a run with these overrides works: without any in the checkout itself, otherwise in a worktree of its own.

    Raises:
        UserError: the parameters are wrong, the teacher or the text is not there, or overrides need a git checkout
            with a commit.
    """
    if preset or values:
        return prepare(root, preset, values)
    params = load_params(root / "params.yaml")
    check_sources(params, root)
    return Worktree(None, root, params, {})


def prepare(root: Path, preset: str | None, values: Mapping[str, Any] | None, name: str | None = None) -> Worktree:
    """Make the worktree for these overrides, or bring it back; `name` replaces the one made of them.

    Raises:
        UserError: the overrides are wrong, the teacher or the text is not there, or the project is no git checkout
            with a commit.
    """
    laid_over = overrides(preset, values)
    check_sources(overridden(root, read_yaml(root / "params.yaml"), laid_over)[1], root)
    commit, dirty = git_state(root, besides=("dvc.lock", "package.yaml"))
    if commit == "unknown":
        raise UserError(f"{root} is no git checkout with a commit: edit params.yaml; {dvc_graph.NEEDS_GIT}")
    if dirty:
        logger.warning("uncommitted changes are not part of this run: its worktree holds %s plus overrides", commit[:9])
    name = (name or f"{preset or 'set'}-{sha256_json(laid_over)[:8]}").replace("_", "-")
    folder = root / ".worktrees" / name
    _checkout(root, folder, commit)
    head = yaml.safe_load(git(folder, "show", "HEAD:params.yaml"))
    merged, params = overridden(root, head, laid_over)
    write_text(folder / "params.yaml", yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))
    _share_settings(root, folder)
    return Worktree(name, folder, params, _environment(root, folder), label(preset, values))


def _checkout(root: Path, worktree: Path, commit: str) -> None:
    if (worktree / ".git").exists():
        try:
            if _git_folder(worktree) != _git_folder(root):
                raise UserError("its project was copied, and it still belongs to the original")
            if git(worktree, "rev-parse", "HEAD") == commit:
                return
            git(worktree, "checkout", "--force", "--detach", commit)
            return
        except UserError as error:
            logger.warning("%s is made anew: %s", worktree, error)
            shutil.rmtree(worktree)
    elif worktree.exists():
        shutil.rmtree(worktree)
    git(root, "worktree", "prune")
    git(root, "worktree", "add", "--detach", str(worktree), commit)


def _git_folder(checkout: Path) -> Path:
    return (checkout / git(checkout, "rev-parse", "--git-common-dir")).resolve()


def _share_settings(root: Path, worktree: Path) -> None:
    """Give a worktree DVC's cache, remotes and other settings of the checkout.

    They are written here, because `dvc config` writes ASCII alone and empties the file where a path has other letters.
    Paths inside the project are relative, as DVC reads them: to the folder of the file.
    """
    local = ConfigObj(encoding="utf-8", interpolation=False)
    for name in ("config", "config.local"):
        if (root / ".dvc" / name).is_file():
            local.merge(dvc_graph.read_settings(root / ".dvc" / name))
    for section, settings in local.items():
        for key in PATHS.intersection(settings) if section.startswith("remote ") else ():
            if "://" not in settings[key]:
                settings[key] = _from_worktree(root, worktree, root / ".dvc" / Path(settings[key]).expanduser())
    cache = root / dvc_graph.run_dvc(root, "cache", "dir").strip()
    local["cache"] = {**local.get("cache", {}), "dir": _from_worktree(root, worktree, cache)}
    with (worktree / ".dvc" / "config.local").open("wb") as file:
        local.write(file)


def _from_worktree(root: Path, worktree: Path, path: Path) -> str:
    """A path for the worktree's .dvc/config.local: relative where it lies in the project, which can then be moved."""
    path = path.resolve()
    inside = path.is_relative_to(root.resolve())
    return os.path.relpath(path, (worktree / ".dvc").resolve()) if inside else str(path)


def _environment(root: Path, worktree: Path) -> dict[str, str]:
    """Stages of a checkout import the worktree's own code: `lolcats_kernels` too, whose folder has another name."""
    found = {"MLFLOW_TRACKING_URI": tracking_uri(root), RESULTS_VARIABLE: str(root / ".scratch" / "results")}
    if (worktree / package.PACKAGE).is_file():
        return found  # no checkout: the installed package is on the path already
    imports = worktree / ".scratch" / "imports"
    imports.mkdir(parents=True, exist_ok=True)
    link = imports / "lolcats_kernels"
    link.unlink(missing_ok=True)  # one of before the project was moved or copied leads elsewhere
    link.symlink_to(worktree / "kernels", target_is_directory=True)
    path = [str(worktree), str(imports), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(part for part in path if part), **found}


def save(worktree: Worktree) -> None:
    """Save a worktree's result as a DVC experiment of its commit; a newer result replaces an older one."""
    if worktree.name:
        env = identity(worktree.root)
        dvc_graph.run_dvc(worktree.root, "exp", "save", "--force", "--name", worktree.name, env=env)

"""Puts a model on the Hugging Face hub: an export, as `lolcats export` writes it, with its card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from lolcats_common.errors import UserError
from lolcats_common.project import find_root
from lolcats_core.export.delta import DELTA
from tasks.cli.export import CARD, export
from tasks.runner.mlflow_run import first_line

# What an earlier push may have left that would be loaded in place of this one's weights.
REPLACED = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Pushed:
    """`files`: path and bytes of each. `url`: of the commit, None where nothing was sent."""

    files: dict[str, int]
    url: str | None


def push(model: str, repo: str, *, form: str = "merged", private: bool = True, dry_run: bool = False) -> Pushed:
    """Send a registered version, or a directory that `lolcats export` wrote, to a repository of the hub.

    Args:
        form: of a registered version: ``merged`` or ``delta``.
        private: of a repository that is made now; one that exists stays as it is.
        dry_run: only say what would be sent.

    Raises:
        UserError: there is no such model, `repo` is no id, there is no token, or the hub refuses.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, flags=re.ASCII):
        raise UserError(f"REPO must be owner/name, got {repo!r}")
    token = get_token()
    if token is None and not dry_run:
        raise UserError("there is no token: set HF_TOKEN to one that may write (Settings, Access Tokens on the hub)")
    with _exported(model, form) as folder:
        files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _below(folder)}
        if dry_run:
            return Pushed(files, None)
        api = HfApi(token=token)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            sent = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"{model}, {form}", delete_patterns=REPLACED
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
            raise UserError(f"{repo} was not pushed to {api.endpoint}: {first_line(error)}") from error
        return Pushed(files, str(sent.commit_url))


def _below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@contextmanager
def _exported(model: str, form: str) -> Iterator[Path]:
    """The directory of an export: `model` itself, or that of a registered version, written for the moment."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / CARD).is_file() or not any((folder / file).is_file() for file in ("config.json", DELTA)):
            raise UserError(f"{folder} is no export: a model with its {CARD}, as `lolcats export` writes it")
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lolcats-push-") as temporary:
        yield export(find_root(), model, form=form, to=Path(temporary) / "export")

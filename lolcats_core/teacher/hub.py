"""A teacher on the Hugging Face hub: checked before its weights are fetched, and what to do when the hub refuses."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import NoReturn

from lolcats_common.errors import UserError
from lolcats_common.params import TeacherParams
from lolcats_common.sources import COMMIT
from lolcats_core.teacher.checks import INDEX, SMALL_FILES, check_config, check_tokenizer, declared_shapes, weight_files

logger = logging.getLogger(__name__)


def fetch(params: TeacherParams) -> Path:
    """Check a hub id's small files, then fetch its weights; the snapshot's directory in the Hugging Face cache.

    Raises:
        UserError: the revision is no commit, the model does not fit, or the hub refuses.
    """
    source, revision = params.source, params.revision
    if revision is None or not COMMIT.fullmatch(revision):
        raise UserError(_revision_advice(source, revision))
    listed = _listing(source, revision)
    small = [name for name in (*SMALL_FILES, INDEX) if name in listed]
    if params.trust_remote_code:
        small += [name for name in listed if name.endswith(".py") and "/" not in name]
    folder = snapshot(source, revision, small) if small else Path()
    if "config.json" not in listed:
        raise UserError(f"teacher {source}: config.json is missing at {revision[:12]}; is it a transformers model?")
    config = check_config(folder, source, params.trust_remote_code)
    declared_shapes(config, source, params.trust_remote_code)
    names = weight_files(folder, source, listed)
    check_tokenizer(folder, source, int(config.vocab_size), params.trust_remote_code)
    logger.info("teacher %s: fetching %d files of weights where they are not cached", source, len(names))
    return snapshot(source, revision, [*small, *names])


def _listing(source: str, revision: str) -> set[str]:
    """Names of the files at a commit: from the hub, or from the cache when the hub is switched off."""
    from huggingface_hub import HfApi, constants

    if not constants.is_offline_mode():
        try:
            return set(HfApi().list_repo_files(source, revision=revision))
        except Exception as error:
            if not _unreachable(error):
                _refuse(error, source, revision)
            logger.warning("the Hugging Face hub cannot be reached; trying the cache")
    folder = snapshot(source, revision, ["*"], cached=True)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def snapshot(source: str, revision: str, names: list[str], cached: bool = False) -> Path:
    """The directory in the Hugging Face cache that has the files `names` of a commit, fetched where they are missing.

    Args:
        cached: take what the cache has; nothing is fetched.

    Raises:
        UserError: the hub refuses or cannot be reached, and the cache lacks a file.
    """
    from huggingface_hub import constants, snapshot_download

    with contextlib.suppress(Exception):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=names, local_files_only=True))
        if cached or constants.is_offline_mode() or all((folder / name).is_file() for name in names):
            return folder
    if cached:
        raise UserError(_offline_advice(source, revision))
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=names))
    except Exception as error:
        _refuse(error, source, revision)


def _refuse(error: Exception, source: str, revision: str) -> NoReturn:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"https://huggingface.co/{source}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        message = f"is gated; accept its licence at {page}, then set HF_TOKEN to a token that may read it"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"has no revision {revision}; take a commit from {page}/commits"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        message = "is not on the Hugging Face hub, or is private; correct `teacher.source`, or set HF_TOKEN"
    elif isinstance(error, errors.HFValidationError):
        message = "is not a valid Hugging Face id (owner/name); correct `teacher.source`"
    elif _unreachable(error):
        raise UserError(_offline_advice(source, revision)) from None
    elif isinstance(error, OSError) and error.errno == 28:
        message = "does not fit on the disk; free space, or set HF_HOME to a larger disk"
    elif status is not None or isinstance(error, OSError):
        reason = " ".join(str(error).split())[:200]
        message = f"could not be fetched ({reason}); run the same command again"
    else:
        raise error
    raise UserError(f"teacher {source} {message}") from None


def _unreachable(error: Exception) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | TimeoutError | ConnectionError):
        return True
    # The hub's client raises its HTTP library's errors (httpx or httpx2, by version) when it gets no answer.
    libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return getattr(error, "response", None) is None and bool(libraries & {"httpx", "httpx2", "requests"})


def _offline_advice(source: str, revision: str) -> str:
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hugging Face hub cannot be reached"
    return (
        f"teacher {source}: {why} and the cache lacks files of it; where there is a connection run "
        f"`hf download {source} --revision {revision}`, or give a local directory as `teacher.source`"
    )


def _revision_advice(source: str, revision: str | None) -> str:
    """How to pin a hub id; names the commit that the branch has now where the hub answers."""
    from huggingface_hub import HfApi, constants

    given = "null" if revision is None else repr(revision)
    message = f"teacher {source}: `teacher.revision` must be a commit of 40 hexadecimal digits, got {given}"
    if not constants.is_offline_mode():
        try:
            commit = HfApi().model_info(source, revision=revision, timeout=10).sha
        except Exception as error:
            if not _unreachable(error):
                _refuse(error, source, revision or "main")
        else:
            return f"{message}; {revision or 'main'} is {commit} now: set `teacher.revision: {commit}`"
    return f"{message}; take one from https://huggingface.co/{source}/commits"

"""The teacher: found, checked and pinned by content before anything expensive, loaded later only if it is unchanged.

Three sources: ``builtin`` (ships with the project), a local directory, a Hugging Face id with a commit. A pin names
the SHA-256 of every file that matters; weights stay where they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file, sha256_json, write_json
from lolcats_common.params import TeacherParams
from lolcats_common.progress import progress
from lolcats_core.teacher.checks import (
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    check_config,
    check_tokenizer,
    check_weights,
    weight_files,
)

logger = logging.getLogger(__name__)
BUILTIN = Path(__file__).parent / "builtin"
PIN, TOKENIZER = "teacher.json", "tokenizer"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = ("config.json", "generation_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class TeacherPin:
    """Which teacher, exactly.

    Attributes:
        source: as in params.yaml. kind: ``builtin``, ``directory`` or ``hub``.
        revision: the commit of a hub id, else None.
        files: SHA-256 by file name; `digest`: SHA-256 of that mapping, one name for all of it.
        model_type, architecture: family and class of the configuration.
        parameters: as stored (tied embeddings once). dtype: of most weights, in safetensors' words.
        vocab_size: rows of the embeddings. context: the longest sequence it was trained for, where stated.
    """

    source: str
    kind: str
    revision: str | None
    trust_remote_code: bool
    files: dict[str, str]
    digest: str
    model_type: str
    architecture: str
    parameters: int
    layers: int
    vocab_size: int
    context: int | None
    bytes: int
    dtype: str


def resolve_teacher(params: TeacherParams, root: Path) -> TeacherPin:
    """Find the teacher, check everything that does not need its weights loaded, and pin it by content.

    Of a hub id the configuration and tokenizer are fetched and checked first, the weights only when these fit.

    Args:
        root: what a relative directory is relative to.

    Raises:
        UserError: it cannot be found, reached, read or linearized; the message says what to do.
    """
    kind, folder = _find(params, root)
    if kind == "hub":
        folder = _fetch(params)
    return _check(params, kind, folder)


def describe(params: TeacherParams, root: Path, sha256: Callable[[Path], str] = sha256_file) -> dict[str, Any]:
    """What decides the teacher, without looking into it: its kind, revision and each file of a local directory.

    Raises:
        UserError: it cannot be found or read.
    """
    kind, folder = _find(params, root)
    try:
        found = sorted(file for file in folder.iterdir() if file.is_file()) if kind == "directory" else []
        files = {file.name: sha256(file) for file in found if not file.name.startswith(".")}
    except OSError as error:
        raise UserError(f"teacher {params.source}: {error.filename} cannot be read: {error.strerror}") from None
    return {"kind": kind, "source": params.source, "revision": params.revision, "files": files}


def write_pin(pin: TeacherPin, root: Path, out: Path) -> None:
    """Write teacher.json and the tokenizer's files into `out`."""
    write_json(out / PIN, dataclasses.asdict(pin))
    tokenizer = check_tokenizer(locate(pin, root), pin.source, pin.vocab_size, pin.trust_remote_code)
    tokenizer.save_pretrained(out / TOKENIZER)


def read_pin(pin_dir: Path) -> TeacherPin:
    """The pin that the stage `teacher` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return TeacherPin(**json.loads((pin_dir / PIN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{pin_dir / PIN} is missing; run `dvc repro teacher`") from None
    except (ValueError, TypeError):
        raise UserError(f"{pin_dir / PIN} is damaged; run `dvc repro --force teacher`") from None


def locate(pin: TeacherPin, root: Path) -> Path:
    """Directory of the pinned teacher's files.

    Raises:
        UserError: it is not there any more, or the hub cannot be reached.
    """
    if pin.kind == "builtin":
        return BUILTIN
    if pin.kind == "hub":
        return _snapshot(pin.source, str(pin.revision), sorted(pin.files))
    folder = _directory(pin.source, root)
    if not folder.is_dir():
        raise UserError(f"teacher {pin.source}: the directory is gone; put it back or change `teacher.source`")
    return folder


def verified_folder(pin_dir: Path) -> Path:
    """Directory of the pinned teacher's files, after every byte of them was compared with the pin.

    Raises:
        UserError: a file changed since the teacher was pinned.
    """
    pin = read_pin(pin_dir)
    folder = locate(pin, _root_of(pin_dir))
    _verify(pin, folder)
    return folder


def load_teacher(pin_dir: Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The pinned teacher with softmax attention (SDPA), in evaluation mode, its weights frozen.

    Args:
        pin_dir: outputs/teacher.

    Raises:
        UserError: a file changed since the teacher was pinned, or the files lack weights of the model.
    """
    from transformers import AutoModelForCausalLM

    pin = read_pin(pin_dir)
    folder = verified_folder(pin_dir)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=pin.trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for problem, names in (("lack", info["missing_keys"]), ("have another shape for", info["mismatched_keys"])):
        if names:
            first = sorted(str(name) for name in names)[0]
            raise UserError(f"teacher {pin.source}: the weights {problem} {first}; fetch or copy the model again")
    model.requires_grad_(False)
    model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    return model


def load_tokenizer(pin_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the pin.

    Raises:
        UserError: it is missing or damaged.
    """
    pin = read_pin(pin_dir)
    tokenizer: PreTrainedTokenizerBase = check_tokenizer(
        pin_dir / TOKENIZER, pin.source, pin.vocab_size, pin.trust_remote_code
    )
    return tokenizer


def _root_of(pin_dir: Path) -> Path:
    """The project that has `pin_dir` as its outputs/teacher."""
    return pin_dir.absolute().parents[1]


def _directory(source: str, root: Path) -> Path:
    return root / Path(source).expanduser()


def _find(params: TeacherParams, root: Path) -> tuple[str, Path]:
    source = params.source
    if source == "builtin":
        return "builtin", BUILTIN
    folder = _directory(source, root)
    if folder.is_dir():
        return "directory", folder
    if folder.exists():
        raise UserError(f"teacher {source} is a file; `teacher.source` takes the directory that holds config.json")
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return "hub", folder
    if difflib.get_close_matches(source, ["builtin"]):
        raise UserError(f"teacher {source}: no such directory; did you mean `builtin`?")
    raise UserError(
        f"teacher {source}: no such directory, and not a Hugging Face id (owner/name); correct `teacher.source`"
    )


def _check(params: TeacherParams, kind: str, folder: Path) -> TeacherPin:
    source = params.source
    if not folder.is_dir():
        raise UserError(f"teacher {source}: {folder.name} is missing from the installation; install the project again")
    try:
        listed = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise UserError(f"teacher {source}: the directory cannot be read ({error.strerror})") from None
    config = check_config(folder, source, params.trust_remote_code)
    names = weight_files(folder, source, listed)
    weights = check_weights(folder, names, source)
    rows = weights.embedding_rows or int(config.vocab_size)
    check_tokenizer(folder, source, rows, params.trust_remote_code)
    small = [name for name in _SMALL if name in listed]
    kept = [*names, *small, *([INDEX] if names != [WEIGHTS] else [])]
    if params.trust_remote_code:
        kept += [name for name in listed if name.endswith(".py")]
    files = _hashes(folder, kept)
    return TeacherPin(
        source=source,
        kind=kind,
        revision=params.revision if kind == "hub" else None,
        trust_remote_code=params.trust_remote_code,
        files=files,
        digest=sha256_json(files),
        model_type=config.model_type,
        architecture=(config.architectures or [config.model_type])[0],
        parameters=weights.parameters,
        layers=int(config.num_hidden_layers),
        vocab_size=rows,
        context=getattr(config, "max_position_embeddings", None),
        bytes=weights.bytes,
        dtype=weights.dtype,
    )


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name, with progress where the files are large enough for a person to wait."""
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    total = sum(sizes.values())
    if total < 2**30:
        return {name: sha256_file(folder / name) for name in sizes}
    found = {}
    with progress(total // 2**20, "hashing the teacher (MiB)") as shown:
        for name, size in sizes.items():
            found[name] = sha256_file(folder / name)
            shown.update(size // 2**20)
    return found


def _verify(pin: TeacherPin, folder: Path) -> None:
    missing = [name for name in pin.files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"teacher {pin.source}: {missing[0]} is gone since the teacher was pinned; put it back")
    for name, digest in _hashes(folder, pin.files).items():
        if digest != pin.files[name]:
            raise UserError(
                f"teacher {pin.source}: {name} changed since the teacher was pinned; put the old file back, "
                "or pin the new one with `dvc repro --force teacher`"
            )


# The hub


def _fetch(params: TeacherParams) -> Path:
    """Check a hub id's small files, then fetch its weights; the snapshot's directory in the Hugging Face cache."""
    source, revision = params.source, params.revision
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(_revision_advice(source, revision))
    listed = _listing(source, revision)
    small = [name for name in (*_SMALL, INDEX) if name in listed]
    if params.trust_remote_code:
        small += [name for name in listed if name.endswith(".py") and "/" not in name]
    folder = _snapshot(source, revision, small) if small else Path()
    if "config.json" not in listed:
        raise UserError(f"teacher {source}: config.json is missing at {revision[:12]}; is it a transformers model?")
    config = check_config(folder, source, params.trust_remote_code)
    names = weight_files(folder, source, listed)
    check_tokenizer(folder, source, int(config.vocab_size), params.trust_remote_code)
    logger.info("teacher %s: fetching %d files of weights where they are not cached", source, len(names))
    return _snapshot(source, revision, [*small, *names])


def _listing(source: str, revision: str) -> set[str]:
    """Names of the files at a commit: from the hub, or from the cache when the hub is switched off."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        folder = _snapshot(source, revision, ["*"])
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        return set(HfApi().list_repo_files(source, revision=revision))
    except Exception as error:
        if not _unreachable(error):
            _refuse(error, source, revision)
        logger.warning("the Hugging Face hub cannot be reached; trying the cache")
        folder = _snapshot(source, revision, ["*"], local=True)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _snapshot(source: str, revision: str, names: list[str], local: bool = False) -> Path:
    from huggingface_hub import constants, snapshot_download

    with contextlib.suppress(Exception):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=names, local_files_only=True))
        if local or constants.is_offline_mode() or all((folder / name).is_file() for name in names):
            return folder
    if local:
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

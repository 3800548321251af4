"""The teacher: found, checked and pinned by content before anything expensive, loaded later only if it is unchanged.

Four sources: ``builtin`` (ships with the project), a local directory, a GGUF file, a Hugging Face id with a commit. A
pin names the SHA-256 of every file that matters; weights stay where they are, those of a GGUF file dequantized in the
Hugging Face cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file, sha256_json, write_json
from lolcats_common.params import TeacherParams
from lolcats_common.progress import progress
from lolcats_common.sources import find_teacher, source_path
from lolcats_core.teacher import hub
from lolcats_core.teacher.checks import (
    INDEX,
    SMALL_FILES,
    WEIGHTS,
    Weights,
    check_config,
    check_tokenizer,
    check_weights,
    declared_shapes,
    weight_files,
)
from lolcats_core.teacher.gguf_model import dequantized, folder_of, read_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = Path(__file__).parent / "builtin"
PIN, TOKENIZER = "teacher.json", "tokenizer"


@dataclass(frozen=True)
class TeacherPin:
    """Which teacher, exactly.

    Attributes:
        source: as in params.yaml. kind: ``builtin``, ``directory``, ``gguf`` or ``hub``.
        revision: the commit of a hub id, the SHA-256 of a GGUF file, else None.
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
    kind, path = _find(params, root)
    if kind == "gguf":
        digest = _hashes(path.parent, [path.name])[path.name]
        return _pin(params, kind, dequantized(path, params.source, digest), digest)
    if kind == "hub":
        return _pin(params, kind, hub.fetch(params), params.revision)
    return _pin(params, kind, path)


def examine_teacher(params: TeacherParams, root: Path) -> PreTrainedConfig | None:
    """Check as `resolve_teacher` does what is on this machine, without hashing it; None for a Hugging Face id.

    Raises:
        UserError: it cannot be found, read or linearized.
    """
    kind, path = _find(params, root)
    if kind == "gguf":
        return read_model(path, params.source).config
    return None if kind == "hub" else _check(params, path).config


def describe(params: TeacherParams, root: Path, sha256: Callable[[Path], str] = sha256_file) -> dict[str, Any]:
    """What decides the teacher, without looking into it: its kind, its revision, its files where they are local.

    Raises:
        UserError: it cannot be found or read.
    """
    kind, path = _find(params, root)
    found = [path] if kind == "gguf" else []
    try:
        if kind == "directory":
            found = sorted(file for file in path.iterdir() if file.is_file())
        files = {file.name: sha256(file) for file in found if not file.name.startswith(".")}
    except OSError as error:
        raise UserError(f"teacher {params.source}: {error.filename} cannot be read: {error.strerror}") from None
    return {"kind": kind, "source": params.source, "revision": params.revision, "files": files}


def write_pin(pin: TeacherPin, root: Path, out: Path) -> None:
    """Write teacher.json and the tokenizer's files into `out`."""
    write_json(out / PIN, dataclasses.asdict(pin))
    tokenizer = check_tokenizer(locate(pin, root), pin.source, pin.vocab_size, pin.trust_remote_code)
    tokenizer.save_pretrained(out / TOKENIZER)


def locate(pin: TeacherPin, root: Path) -> Path:
    """Directory of the pinned teacher's files.

    Raises:
        UserError: it is not there any more, or the hub cannot be reached.
    """
    if pin.kind == "builtin":
        return BUILTIN
    if pin.kind == "hub":
        return hub.snapshot(pin.source, str(pin.revision), sorted(pin.files))
    if pin.kind == "gguf":
        return _locate_gguf(pin, root)
    folder = source_path(pin.source, root)
    if not folder.is_dir():
        raise UserError(f"teacher {pin.source}: the directory is gone; put it back or change `teacher.source`")
    return folder


def _locate_gguf(pin: TeacherPin, root: Path) -> Path:
    folder = folder_of(str(pin.revision))
    if folder.is_dir():
        return folder
    path = source_path(pin.source, root)
    if not path.is_file():
        raise UserError(f"teacher {pin.source}: the file is gone; put it back or change `teacher.source`")
    if _hashes(path.parent, [path.name])[path.name] != pin.revision:
        raise UserError(
            f"teacher {pin.source} changed since it was pinned; put the old file back, or pin the new one with "
            "`dvc repro --force teacher`"
        )
    return dequantized(path, pin.source, str(pin.revision))


class Teacher:
    """The teacher that the stage `teacher` pinned: its shape at once, its files after they were compared with the pin.

    Attributes:
        pin: what was pinned. context: the longest sequence it was trained for, where stated.
    """

    def __init__(self, pin: TeacherPin, pin_dir: Path) -> None:
        self.pin, self.pin_dir = pin, pin_dir
        self.context = pin.context

    @classmethod
    def open(cls, pin_dir: Path) -> Teacher:
        """The teacher of a project's outputs/teacher.

        Raises:
            UserError: the pin is missing or damaged.
        """
        path = pin_dir / PIN
        try:
            return cls(TeacherPin(**json.loads(path.read_text(encoding="utf-8"))), pin_dir)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run `dvc repro teacher`") from None
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; run `dvc repro --force teacher`") from None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration; no weights are read.

        Raises:
            UserError: the directory is gone, or the hub cannot be reached.
        """
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._located, trust_remote_code=self.pin.trust_remote_code)

    @cached_property
    def folder(self) -> Path:
        """Directory of the files, after every byte of them was compared with the pin and every weight is a number.

        Raises:
            UserError: a file changed since the teacher was pinned, or a tensor is no floating point, NaN or infinite.
        """
        _verify(self.pin, self._located)
        _check_numbers(self.pin, self._located)
        return self._located

    @cached_property
    def _located(self) -> Path:
        return locate(self.pin, self.pin_dir.absolute().parents[1])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with the pin.

        Raises:
            UserError: it is missing or damaged.
        """
        pin, folder = self.pin, self.pin_dir / TOKENIZER
        tokenizer: PreTrainedTokenizerBase = check_tokenizer(folder, pin.source, pin.vocab_size, pin.trust_remote_code)
        return tokenizer

    def load(self, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        """The model with softmax attention (SDPA), in evaluation mode, its weights frozen.

        Raises:
            UserError: a file changed since the teacher was pinned, or the files lack weights of the model.
        """
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=self.pin.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
        model: Any = loaded[0]
        info: dict[str, Any] = loaded[1]
        for problem, names in (("lack", info["missing_keys"]), ("have another shape for", info["mismatched_keys"])):
            if names:
                name = min(map(str, names))
                raise UserError(
                    f"teacher {self.pin.source}: the weights {problem} {name}; fetch or copy the model again"
                )
        return cast("PreTrainedModel", model.requires_grad_(False).to(device).eval())


def _find(params: TeacherParams, root: Path) -> tuple[str, Path]:
    kind, folder = find_teacher(params, root)
    return kind, BUILTIN if kind == "builtin" else folder


@dataclass(frozen=True)
class _Checked:
    """A directory with a teacher: its configuration, weights, rows of the embedding, and the files that matter."""

    config: PreTrainedConfig
    weights: Weights
    rows: int
    files: list[str]


def _check(params: TeacherParams, folder: Path) -> _Checked:
    # torch takes seconds to load, and who only hashes a teacher's files does not need it.
    from lolcats_core.compute.numbers import check_dtypes

    source = params.source
    if not folder.is_dir():
        raise UserError(f"teacher {source}: {folder.name} is missing from the installation; install the project again")
    try:
        entries = list(folder.iterdir())
        listed = {path.name for path in entries if path.is_file()}
        # Whoever opens a pipe that nobody writes waits for ever.
        special = [path.name for path in entries if path.exists() and not path.is_file() and not path.is_dir()]
    except OSError as error:
        raise UserError(f"teacher {source}: the directory cannot be read ({error.strerror})") from None
    if special:
        raise UserError(f"teacher {source}: {special[0]} must be a file, not a device, a pipe or a socket")
    config = check_config(folder, source, params.trust_remote_code)
    names = weight_files(folder, source, listed)
    weights = check_weights(folder, names, source, declared_shapes(config, source, params.trust_remote_code))
    check_dtypes((folder / name for name in names), f"teacher {source}")
    rows = weights.embedding_rows or int(config.vocab_size)
    check_tokenizer(folder, source, rows, params.trust_remote_code)
    small = [name for name in SMALL_FILES if name in listed]
    kept = [*names, *small, *([INDEX] if names != [WEIGHTS] else [])]
    if params.trust_remote_code:
        kept += [name for name in listed if name.endswith(".py")]
    return _Checked(config, weights, rows, kept)


def _pin(params: TeacherParams, kind: str, folder: Path, revision: str | None = None) -> TeacherPin:
    checked = _check(params, folder)
    config, weights = checked.config, checked.weights
    files = _hashes(folder, checked.files)
    pin = TeacherPin(
        source=params.source,
        kind=kind,
        revision=revision,
        trust_remote_code=params.trust_remote_code,
        files=files,
        digest=sha256_json(files),
        model_type=config.model_type,
        architecture=(config.architectures or [config.model_type])[0],
        parameters=weights.parameters,
        layers=int(config.num_hidden_layers),
        vocab_size=checked.rows,
        context=getattr(config, "max_position_embeddings", None),
        bytes=weights.bytes,
        dtype=weights.dtype,
    )
    _check_numbers(pin, folder)
    return pin


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


def _check_numbers(pin: TeacherPin, folder: Path) -> None:
    from lolcats_core.compute.numbers import check_numbers

    check_numbers((folder / name for name in pin.files if name.endswith(".safetensors")), f"teacher {pin.source}")


def _verify(pin: TeacherPin, folder: Path) -> None:
    others = [] if pin.kind == "hub" else [name for name in SMALL_FILES if name not in pin.files]
    added = [name for name in others if (folder / name).exists()]
    if added:
        raise UserError(
            f"teacher {pin.source}: {added[0]} was added since the teacher was pinned; remove it, or pin the teacher "
            "with it with `dvc repro --force teacher`"
        )
    missing = [name for name in pin.files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"teacher {pin.source}: {missing[0]} is gone since the teacher was pinned; put it back")
    weight_files(folder, pin.source, {path.name for path in folder.iterdir() if path.is_file()})
    for name, digest in _hashes(folder, pin.files).items():
        if digest != pin.files[name]:
            raise UserError(
                f"teacher {pin.source}: {name} changed since the teacher was pinned; put the old file back, "
                "or pin the new one with `dvc repro --force teacher`"
            )

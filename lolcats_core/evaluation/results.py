"""Results that are kept: a measurement with the same model, code, settings and inputs is read, not repeated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lolcats_common.files import sha256_file, sha256_json, write_json
from lolcats_common.import_closure import import_closure

logger = logging.getLogger(__name__)
PROJECT = Path(__file__).parents[2]
# The module of the linearized models' classes; what it imports decides what they compute from their weights.
MODEL = "lolcats_core.model.modeling"


def model_hash(model: nn.Module) -> str:
    """SHA-256 of all that decides a model's answers: class, configuration, weights, the code of linearized layers.

    The versions of torch and transformers, the dtype and the kind of device are part of it.
    """
    config = getattr(model, "config", None)
    values = config.to_dict() if config is not None else {}
    for name in ("_name_or_path", "auto_map", "architectures", "transformers_version", "dtype", "torch_dtype"):
        values.pop(name, None)
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    if values.get("linearize"):
        digest.update(code_hash().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        # Bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 of the code that linearized models run."""
    return _hash(code_files())


@cache
def measure_hash() -> str:
    """SHA-256 of the code and the data files that measure."""
    return _hash(measure_files())


def code_files() -> set[Path]:
    """Every file of the project behind the linearized models' classes."""
    return set(import_closure(MODEL, root=PROJECT).values())


def measure_files() -> set[Path]:
    """Every file of this folder and of the project behind it, without those of `code_files`.

    A measurement of the softmax teacher does not run linearized layers, so their code does not make it void; one of a
    student is keyed by `code_hash` besides.
    """
    folder = PROJECT / "lolcats_core" / "evaluation"
    own = {file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    modules = [file.relative_to(PROJECT).with_suffix("") for file in own if file.suffix == ".py"]
    names = [".".join(module.parts).removesuffix(".__init__") for module in modules]
    return own.union(import_closure(*names, root=PROJECT).values()) - code_files()


def _hash(files: Iterable[Path]) -> str:
    return sha256_json({file.relative_to(PROJECT).as_posix(): sha256_file(file) for file in files})


class ResultCache:
    """Measurements as JSON files, named by what they measure and a hash of everything that decides the answer.

    Args:
        folder: of the files.
        asked_by: source files outside this package that choose what is measured.
    """

    def __init__(self, folder: Path, asked_by: Iterable[Path] = ()) -> None:
        self.folder = folder
        self._code = [measure_hash(), *(sha256_file(file) for file in asked_by)]

    def get(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The kept result, or that of `measure`, which is then kept. A damaged file counts as none.

        Args:
            key: plain values; whatever the result depends on besides the code that measures.
        """
        file = self.folder / f"{name}-{sha256_json({**key, 'code': self._code})[:24]}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError):
            logger.warning("%s is damaged; measured again", file)
        result = measure()
        write_json(file, result)
        return dict(result)

"""Results that are kept: a measurement with the same model, code, settings and inputs is read, not repeated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lolcats_common.files import sha256_file, sha256_json, write_json

logger = logging.getLogger(__name__)
PROJECT = Path(__file__).parents[2]
# The files that decide what a linearized model computes from its weights.
MODEL_CODE = ("attention", "cache", "feature_maps", "kv_groups", "modeling")


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
    """SHA-256 of the code that linearized layers run."""
    files = [PROJECT / "lolcats_core" / f"{name}.py" for name in MODEL_CODE]
    return _hash([*files, *(PROJECT / "kernels").rglob("*.py")])


@cache
def measure_hash() -> str:
    """SHA-256 of the code that measures."""
    return _hash(list(Path(__file__).parent.rglob("*.py")))


def _hash(files: list[Path]) -> str:
    return sha256_json({file.relative_to(PROJECT).as_posix(): sha256_file(file) for file in files if file.is_file()})


class ResultCache:
    """Measurements as JSON files, named by what they measure and a hash of everything that decides the answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The kept result, or that of `measure`, which is then kept. A damaged file counts as none.

        Args:
            key: plain values; whatever the result depends on besides the code that measures.
        """
        file = self.folder / f"{name}-{sha256_json({**key, 'code': measure_hash()})[:24]}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError):
            logger.warning("%s is damaged; measured again", file)
        result = measure()
        write_json(file, result)
        return dict(result)

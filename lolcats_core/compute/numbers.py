"""Weights in safetensors files are numbers: stored as floating point, and neither NaN nor infinite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lolcats_common.errors import UserError

FLOATS = ("F", "BF")  # how safetensors' names of such dtypes begin
# Masks and indices that published checkpoints hold beside their weights; transformers makes them anew.
BUFFERS = ("position_ids", "attn.bias", "attention.bias")
PIECE = 2**24  # values looked at together


def check_dtypes(files: Iterable[Path], source: str) -> None:
    """Look at the headers alone.

    Raises:
        UserError: a tensor is stored as integers, or a file is damaged.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: {path.name} cannot be read ({error}); fetch or copy it again") from None
        for name, dtype in dtypes.items():
            if not dtype.startswith(FLOATS) and not name.endswith(BUFFERS):
                raise UserError(
                    f"{source}: {path.name}: the tensor {name} must be of floating-point numbers, got {dtype}; "
                    "fetch or copy it again"
                )


def check_numbers(files: Iterable[Path], source: str) -> None:
    """Look at the headers, then at every value, of memory-mapped files a piece at a time.

    Raises:
        UserError: a tensor is stored as integers or holds NaN or infinite values, or a file is damaged.
    """
    files = list(files)
    check_dtypes(files, source)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                check_finite({name: file.get_tensor(name)}, f"{source}: {path.name}")


def check_folder(folder: Path, source: str) -> None:
    """`check_numbers` of the safetensors files in a directory."""
    check_numbers(sorted(folder.glob("*.safetensors")), source)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity, by the tensor's name.

    Raises:
        UserError: there is one.
    """
    for name, tensor in tensors.items():
        for piece in tensor.detach().reshape(-1).split(PIECE):
            # Types of 8 bits know few operations.
            wide = piece.float() if piece.element_size() == 1 and piece.is_floating_point() else piece
            if not bool(torch.isfinite(wide).all()):
                raise UserError(f"{source}: the tensor {name} holds NaN or infinite values; fetch or make it again")

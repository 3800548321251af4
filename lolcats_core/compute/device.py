"""Which device and dtype a run uses, and the seeds it starts from."""

from __future__ import annotations

import random

import numpy as np
import torch

from lolcats_common.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is one.

    Raises:
        UserError: a CUDA device is asked for that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"`compute.device` is {name}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of `compute.precision`."""
    return DTYPES[name]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

"""What a result was made with: libraries, processor, GPU."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

VERSIONED = ("torch", "transformers", "peft", "triton", "lm_eval", "mlflow", "dvc", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    """Version of each library that decides a result, of Python, and the name of the GPU where there is one."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_tags() -> dict[str, str]:
    """Processor, cores and GPU of this machine."""
    import torch

    tags = {"cpu": platform.processor() or platform.machine(), "cores": str(os.cpu_count()), "gpu": "none"}
    if torch.cuda.is_available():
        tags["gpu"] = torch.cuda.get_device_name(0)
        tags["gpus"] = str(torch.cuda.device_count())
        tags["cuda"] = str(torch.version.cuda)
    return tags

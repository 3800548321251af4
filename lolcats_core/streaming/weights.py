"""A model's weights from memory-mapped safetensors files, a part at a time, and models without weights to take them.

Nothing here holds more than the tensors asked for: what a model of any size needs in memory is one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_core.model.families import FAMILIES
from lolcats_core.streaming.copies import worker
from lolcats_core.teacher.checks import weight_files

M = TypeVar("M", bound=PreTrainedModel)
RENAMED = {old: new for family in FAMILIES.values() for old, new in family.renamed.items()}
# Bytes at a multiple of which each tensor of a part begins.
ALIGNED = 256


class WeightFiles:
    """Tensors by name from the safetensors files of a model's directory, later `files` before earlier ones.

    Args:
        folder: a directory that `save_pretrained` wrote. source: what errors call it.
        extra: further safetensors files, such as the feature maps of a student whose base is `folder`.

    Raises:
        UserError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, folder: Path | str, source: str | None = None, extra: Iterable[Path] = ()) -> None:
        folder = Path(folder)
        self.source = source or str(folder)
        listed = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        for path in (*(folder / name for name in weight_files(folder, self.source, listed)), *extra):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"teacher {self.source}: {path.name} cannot be read ({error})") from None
            self._where |= {RENAMED.get(name, name): (file, name) for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """One tensor in CPU memory, in the dtype of the file.

        Raises:
            UserError: no file has it.
        """
        if name not in self._where:
            raise UserError(f"teacher {self.source}: the weights lack {name}; fetch or copy the model again")
        file, stored = self._where[name]
        return file.get_tensor(stored)

    def close(self) -> None:
        self._stack.close()


def without_weights(make: Callable[[], M]) -> M:
    """The model that `make` builds with its parameters on ``meta`` and its buffers (rotary frequencies) real."""
    from accelerate import init_empty_weights  # peft's own dependency; slow to import

    with init_empty_weights(include_buffers=False):
        model = make()
    model.tie_weights()
    return model.requires_grad_(False).eval()


def names_in(model: nn.Module, module: nn.Module) -> dict[str, str]:
    """Name in `module` -> name in `model` of each parameter; tied ones have the name of the first of them."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    return {name: canonical[id(p)] for name, p in module.named_parameters()}


def read(files: WeightFiles, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of `names_in`, mapped from the files."""
    return {name: files[stored] for name, stored in names.items()}


def put(module: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give `module` its weights on `device`; feature maps stay float32, everything else becomes `dtype`.

    Raises:
        UserError: a tensor has another shape than the module.
    """
    shapes = {name: p.shape for name, p in module.named_parameters()}
    moved = {}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"the weights have {tuple(tensor.shape)} for {name}, the model {tuple(shapes[name])}")
        wanted = torch.float32 if "feature_maps." in name and dtype != torch.float64 else dtype
        moved[name] = tensor.to(device, wanted, non_blocking=True)
    module.load_state_dict(moved, strict=False, assign=True)
    for child in module.modules():
        for key, buffer in child.named_buffers(recurse=False):
            setattr(child, key, buffer.to(device))


def drop(module: nn.Module) -> None:
    """Take the weights of `module` away; its buffers stay."""
    for child in module.modules():
        for key, parameter in child.named_parameters(recurse=False):
            child._parameters[key] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


class Prefetcher:
    """Reads the weights of the next part on a thread of its own while the device works on this one.

    For a GPU they wait in one page-locked piece of memory that every part uses again, so the device itself never holds
    more than one part.
    """

    def __init__(self, files: WeightFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        self._thread = worker("weights", device)
        self._next: tuple[dict[str, str], Future[dict[str, Tensor]]] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def start(self, names: dict[str, str]) -> None:
        """Begin to read `names`; what was begun before is dropped."""
        if self.device.type != "cuda":
            self._next = names, self._thread.submit(read, self.files, names)
            return
        # The part before may still be on its way from the same memory.
        taken = torch.cuda.Event(blocking=True)
        taken.record(torch.cuda.current_stream(self.device))
        self._next = names, self._thread.submit(self._lock, names, taken)

    def take(self, names: dict[str, str]) -> dict[str, Tensor]:
        """The tensors of `names`, from the thread if they were begun; to be copied away before the next `start`."""
        begun, self._next = self._next, None
        return begun[1].result() if begun is not None and begun[0] == names else read(self.files, names)

    def _lock(self, names: dict[str, str], taken: torch.cuda.Event) -> dict[str, Tensor]:
        mapped = read(self.files, names)
        starts = [0, *accumulate(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in mapped.values())]
        taken.synchronize()
        if self._memory.nbytes < starts[-1]:
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
        pieces = (
            self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, mapped.values(), strict=False)
        )
        return {name: piece.copy_(mapped[name]) for name, piece in zip(mapped, pieces, strict=True)}

    def close(self) -> None:
        self._thread.shutdown(wait=True)

"""Checkpoints of random weights in the shapes of large models, and random rows, for benchmarks.

Every layer has the same values: they are drawn once, on the GPU, and a model of any depth can be read from the files of
a few layers (`Repeated`), so that neither drawing nor the disk limits what is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.stages import llama_config
from lolcats_common.files import write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.estimation.memory import KNOWN_MODELS, ModelShape
from lolcats_core.model.modeling import empty_student
from lolcats_core.streaming.weights import WeightFiles
from lolcats_core.teacher.checks import INDEX

SHAPES = {
    "8b": KNOWN_MODELS["meta-llama/Llama-3.1-8B"],
    "70b": KNOWN_MODELS["meta-llama/Llama-3.1-70B"],
    "405b": KNOWN_MODELS["meta-llama/Llama-3.1-405B"],
    "tiny": ModelShape(3, 64, 128, 4, 2, 32, 256),
}


class RandomRows:
    """Random token rows that are the same in every process."""

    def __init__(self, rows: int, length: int, vocab: int, seed: int) -> None:
        self.input_ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
        self.sequence_length = length

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[torch.as_tensor(np.asarray(indices))]}


class Repeated(WeightFiles):
    """The files of `write_random` as those of a model of any depth: layer n is layer n mod `held`."""

    def __init__(self, folder: Path, held: int) -> None:
        super().__init__(folder)
        self.held = held

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(re.sub(r"(?<=\.layers\.)\d+", lambda n: str(int(n[0]) % self.held), name))


def write_random(shape: ModelShape, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, one file for each layer and one for both ends; files that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = empty_student(llama_config(replace(shape, layers=1)), LinearizeConfig(feature_dim=16))
    sizes = {name: p.shape for name, p in model.named_parameters() if ".feature_maps." not in name}
    del sizes["linearized.weight"]
    inside = {name: size for name, size in sizes.items() if ".layers.0." in name}
    around = {name: size for name, size in sizes.items() if name not in inside}
    generator = torch.Generator(device).manual_seed(0)

    def draw(size: torch.Size) -> Tensor:
        if len(size) == 1:  # norms
            return torch.ones(size, dtype=dtype)
        # Rows at a time: the embedding of the largest models would take four times its size on the GPU.
        parts = [
            torch.randn((len(rows), size[1]), generator=generator, device=device).mul_(size[1] ** -0.5).to(dtype).cpu()
            for rows in torch.arange(size[0]).split(2**14)
        ]
        return torch.cat(parts)

    def write(file: Path, tensors: dict[str, Tensor]) -> None:
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(file)

    ends = folder / "model-ends.safetensors"
    if not ends.is_file():
        write(ends, {name: draw(size) for name, size in around.items()})
    layers = [folder / f"model-{number}.safetensors" for number in range(shape.layers)]
    if not all(file.is_file() for file in layers):
        drawn = {name: draw(size) for name, size in inside.items()}
        for number, file in enumerate(layers):
            if not file.is_file():
                write(file, {name.replace(".0.", f".{number}.", 1): tensor for name, tensor in drawn.items()})
    where = {name: ends.name for name in around}
    where |= {name.replace(".0.", f".{n}.", 1): file.name for n, file in enumerate(layers) for name in inside}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
    llama_config(shape).save_pretrained(folder)

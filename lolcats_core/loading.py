"""A student read from disk a layer at a time: quantized or divided between processes before the next layer is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lolcats_core import parallel
from lolcats_core.config import LinearizeConfig
from lolcats_core.modeling import empty_student, feature_maps
from lolcats_core.quantization import quantize_projections
from lolcats_core.streaming.weights import WeightFiles, names_in, put, read, without_weights


def load_student(
    folder: Path | str,
    config: PreTrainedConfig,
    settings: LinearizeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    maps: Path | None = None,
    seed: int = 0,
    quantized: bool = False,
) -> PreTrainedModel:
    """The teacher in `folder`, linearized; with several processes its frozen weights are divided between them (FSDP2).

    No more than one whole layer is in a process's memory besides its share. Feature maps are never divided or
    quantized. Quantized weights are small and stay whole in every process.

    Args:
        maps: file of trained feature maps; without it they are those that `linearize` makes with `seed`.
        quantized: hold the layers' projections in NF4.

    Raises:
        UserError: the weights lack a tensor, or the settings do not fit.
    """
    student = without_weights(lambda: empty_student(config, settings))
    files = WeightFiles(folder, extra=[maps] if maps else [])
    generator = torch.Generator().manual_seed(seed)
    shard = parallel.world() > 1 and not quantized
    layers = list(cast(Any, student).base_model.layers)
    # The layers first, then what stands around them; by then the layers' weights have their own names.
    parts = [(layer, names_in(student, layer)) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    around = {k: v for k, v in names_in(student, student).items() if id(student.get_parameter(k)) not in inside}
    table, head = (cast(Any, x) for x in (student.get_input_embeddings(), student.get_output_embeddings()))
    tied = head.weight is table.weight
    around.pop("linearized.weight")
    try:
        for layer, names in parts:
            stored = {name: source for name, source in names.items() if maps or "feature_maps." not in name}
            put(layer, read(files, stored, pin=False), device, dtype)
            for found in feature_maps(layer).values():
                if maps is None:
                    found.to_empty(device=device)
                    found.reset_parameters(generator)
                found.requires_grad_(True)
            if quantized:
                quantize_projections(layer)
            if shard:
                _shard(layer)
        put(student, read(files, around, pin=False), device, dtype)
    finally:
        files.close()
    cast(nn.Embedding, student.linearized).to_empty(device=device).weight.data.zero_()
    if tied:
        student.tie_weights()
    if shard:
        # Stage 1 calls the decoder alone. A table that serves both ends stays whole.
        _shard(cast(nn.Module, student.base_model), {table.weight} if tied else set())
        if not tied:
            _shard(head)
    return student.eval()


def _shard(module: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
    """Divide the frozen weights of `module` between all processes; what trains stays whole in each of them."""
    from torch.distributed.fsdp import fully_shard

    trained = {p for maps in feature_maps(module).values() for p in maps.parameters()}
    fully_shard(module, ignored_params=trained | set(whole))

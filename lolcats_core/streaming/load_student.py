"""A student read from disk a layer at a time: quantized or divided between processes before the next layer is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.compute import distributed
from lolcats_core.compute.quantization import quantize_projections
from lolcats_core.model.modeling import empty_student, feature_maps
from lolcats_core.streaming.weights import WeightFiles, names_in, put, read, without_weights


def load_student(
    source: Path | str | WeightFiles,
    config: PreTrainedConfig,
    settings: LinearizeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    quantized: bool = False,
) -> PreTrainedModel:
    """The teacher in `source`, linearized; with several processes its layers' frozen weights are divided (FSDP2).

    No more than one whole layer is in a process's memory besides its share and the embeddings, which a forward pass
    needs whole at both its ends. Feature maps are never divided or quantized. Quantized weights are small and stay
    whole in every process.

    Args:
        seed: of the feature maps, as in `linearize`.
        quantized: hold the layers' projections in NF4.

    Raises:
        UserError: the weights lack a tensor, or the settings do not fit.
    """
    student = without_weights(lambda: empty_student(config, settings))
    files = source if isinstance(source, WeightFiles) else WeightFiles(source)
    generator = torch.Generator().manual_seed(seed)
    shard = None if quantized or distributed.world() == 1 else _divider(device)
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
            stored = {name: source for name, source in names.items() if "feature_maps." not in name}
            put(layer, read(files, stored), device, dtype)
            for found in feature_maps(layer).values():
                found.to_empty(device=device)
                found.reset_parameters(generator)
                found.requires_grad_(True)
            if quantized:
                quantize_projections(layer)
            if shard is not None:
                shard(layer)
        put(student, read(files, around), device, dtype)
    finally:
        files.close()
    cast(nn.Embedding, student.linearized).to_empty(device=device).weight.data.zero_()
    if tied:
        student.tie_weights()
    if shard is not None:
        # The decoder, which stage 1 calls alone, runs the layers as one pass: it gathers the next one ahead.
        shard(cast(nn.Module, student.base_model), {student.get_parameter(name) for name in around})
    return student.eval()


def _divider(device: torch.device) -> Callable[..., None]:
    """A function that divides the frozen weights of a module between all processes; what trains stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world(),))

    def divide(module: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
        trained = {p for maps in feature_maps(module).values() for p in maps.parameters()}
        fully_shard(module, mesh=mesh, ignored_params=trained | set(whole))

    return divide

"""The door by which a student gets into memory: whole, quantized, divided between processes, or a layer at a time."""

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
from lolcats_core.model.map_files import load_feature_maps
from lolcats_core.model.modeling import empty_student, feature_maps, linearize, tied_head
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.weights import WeightFiles, names_in, put, read, without_weights
from lolcats_core.teacher.pin import Teacher

Student = PreTrainedModel | LayerwiseModel


def open_student(
    teacher: Teacher,
    settings: LinearizeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    maps: Path | None = None,
    quantized: bool = False,
    by_layer: bool = False,
) -> Student:
    """The pinned teacher, linearized, held in the way that its size and the number of processes ask for.

    Args:
        seed: of the feature maps' initial values, as in `linearize`; a model by layers draws them when it is trained.
        maps: file of trained feature maps, which take the place of the initial ones.
        quantized: hold the layers' projections in NF4.
        by_layer: leave the weights in their files; no more than a layer is on the device at a time.

    Raises:
        UserError: the teacher changed since it was pinned, or the settings do not fit it or the maps.
    """
    if by_layer:
        return LayerwiseModel.open(
            teacher.folder, teacher.config, device=device, dtype=dtype, settings=settings, maps=maps
        )
    if quantized or distributed.world() > 1:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        student = load_student(teacher.folder, teacher.config, settings, seed=seed, quantized=quantized, **where)
    else:
        student = linearize(teacher.load(dtype, device), settings, seed=seed)
    if maps is not None:
        load_feature_maps(student, maps)
    return student


def causal_model(student: Student) -> PreTrainedModel:
    """The transformers model of a student; on ``meta`` are the weights that are left in their files."""
    return student.model if isinstance(student, LayerwiseModel) else student


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
    """The teacher in `source`, linearized and read a layer at a time; several processes divide it between them.

    They divide its layers' frozen weights (FSDP2). No more than one whole layer is in a process's memory besides its
    share and the embeddings, which a forward pass needs whole at both its ends. Feature maps are never divided or
    quantized. Quantized weights are small and stay whole in every process.

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
    tied = tied_head(student) is not None
    around.pop("linearized.weight")
    try:
        for layer, names in parts:
            stored = {name: source for name, source in names.items() if "feature_maps." not in name}
            put(layer, read(files, stored), device, dtype)
            for maps in feature_maps(layer).values():
                maps.to_empty(device=device)
                maps.reset_parameters(generator)
                maps.requires_grad_(True)
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

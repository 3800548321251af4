"""A finetuned student on disk, merged and as a delta, also where it is never whole in memory.

Where the base is quantized or divided between processes, the adapters go onto the teacher's files, tensor by tensor. So
a quantized base leaves no trace in the result but through what was learnt on it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_common.files import write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.compute import distributed
from lolcats_core.compute.quantization import QuantizedLinear
from lolcats_core.export.delta import fingerprint_of, save_delta
from lolcats_core.model.families import PREFIX, family_of
from lolcats_core.model.modeling import auto_classes, empty_student
from lolcats_core.model.remote_code import auto_map, write_code
from lolcats_core.streaming.weights import WeightFiles
from lolcats_core.teacher.checks import INDEX, WEIGHTS
from lolcats_core.teacher.pin import Teacher

if TYPE_CHECKING:
    from peft import PeftModel

SHARD = 5 * 10**9


def save_student(adapted: PeftModel, teacher: Teacher, dtype: torch.dtype, out: Path) -> None:
    """Write what finetuning made of a student of `open_student`: adapter/ (the delta) and model/ (merged) in `out`.

    A base in memory that is quantized or divided between processes is not the teacher's own, so the teacher's files
    take its place, and the main process alone writes.
    """
    quantized = any(isinstance(module, QuantizedLinear) for module in adapted.modules())
    if not quantized and distributed.world() == 1:
        save_delta(adapted, out / "adapter", teacher.pin)
        cast(PreTrainedModel, adapted.merge_and_unload()).save_pretrained(out / "model")
        return
    with closing(WeightFiles(teacher.folder)) as files:
        if distributed.is_main():
            weights = base_fingerprint(adapted.get_base_model(), files, dtype)
            save_delta(adapted, out / "adapter", teacher.pin, weights)
            save_merged(adapted, files, dtype, out / "model")
    distributed.barrier()


def base_fingerprint(student: Any, files: WeightFiles, dtype: torch.dtype) -> str:
    """What `delta.fingerprint` says of the base when it is loaded whole, from its files."""
    names = sorted(name for name in _names(student) if ".feature_maps." not in name and name != "linearized.weight")
    return fingerprint_of((name, files[name].to(dtype)) for name in names)


def save_merged(adapted: PeftModel, files: WeightFiles, dtype: torch.dtype, out: Path, shard: int = SHARD) -> None:
    """What `adapted.merge_and_unload().save_pretrained(out)` would write, from the base's `files`.

    Args:
        dtype: of the weights; feature maps stay float32. shard: bytes of each file at most, if no tensor is larger.

    Raises:
        RuntimeError: something that was trained belongs to no weight of the plain student.
    """
    student: Any = adapted.get_base_model()
    trained = _trained(adapted)
    names = _names(student)
    if lost := sorted({*trained["lora"], *trained["maps"]} - names.keys()):
        raise RuntimeError(f"{len(lost)} trained tensors belong to no weight of the merged student, such as {lost[0]}")
    config = copy.deepcopy(student.config)
    config.architectures, config.dtype = [type(student).__name__], dtype
    classes = auto_classes(config)
    config.auto_map = auto_map(classes)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    student.generation_config.save_pretrained(out)
    write_code(out, classes.values())

    def tensor(name: str) -> Tensor:
        if name in trained["maps"]:
            return trained["maps"][name]
        if name == "linearized.weight":
            return torch.zeros(1, 1, dtype=dtype)
        weight = files[name].to(dtype)
        return (weight + trained["lora"][name]).to(dtype) if name in trained["lora"] else weight

    parts = list(_shards(names, shard, dtype))
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensor(name).contiguous() for name in part}, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if len(parts) > 1:
        size = sum(_bytes(name, shape, dtype) for name, shape in names.items())
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _trained(adapted: PeftModel) -> dict[str, dict[str, Tensor]]:
    """LoRA's products by the weights that they are added to, and the feature maps; on the CPU."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, dict[str, Tensor]] = {"lora": {}, "maps": {}}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            product = cast(Any, module).get_delta_weight("default").detach().cpu()
            found["lora"][f"{name.removeprefix('base_model.model.')}.weight"] = product
    for name, parameter in adapted.named_parameters():
        if ".feature_maps." in name and ".original_module." not in name:
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            found["maps"][plain] = parameter.detach().cpu()
    return found


def _names(student: Any) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the plain student, tied ones once."""
    values = {**student.config.to_dict(), "model_type": student.config.model_type.removeprefix(PREFIX)}
    settings = LinearizeConfig.from_dict(values.pop("linearize"))
    for name in ("architectures", "_name_or_path"):
        values.pop(name, None)
    teacher, _ = family_of(student.config).resolve()
    with torch.device("meta"):
        plain = empty_student(teacher(**values), settings)
    plain.tie_weights()
    return {name: parameter.shape for name, parameter in plain.named_parameters()}


def _bytes(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * (4 if ".feature_maps." in name else dtype.itemsize)


def _shards(names: dict[str, torch.Size], limit: int, dtype: torch.dtype) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for name, shape in names.items():
        size = _bytes(name, shape, dtype)
        if part and held + size > limit:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    yield part

"""The delta form of a student: what both stages trained, and which model it belongs on, exactly.

A delta is a peft adapter (LoRA factors and feature maps) with ``delta.json`` beside it, under 1 % of the weights of
a model of 7B parameters. Plain peft loads it onto a saved linearized base. `load_delta` also makes that base, and
refuses any other: it compares configurations before weights are read, and the weights themselves once they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_file, write_json
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.sources import source_path
from lolcats_core.compute.numbers import check_numbers
from lolcats_core.model.families import PREFIX
from lolcats_core.model.map_files import check_settings
from lolcats_core.model.modeling import linearize, tied_head
from lolcats_core.teacher.pin import TeacherPin, locate

if TYPE_CHECKING:
    from peft import PeftModel

DELTA, ADAPTER, ADAPTER_CONFIG = "delta.json", "adapter_model.safetensors", "adapter_config.json"
# What a configuration says besides the function that it defines, together with what any configuration has.
_INCIDENTAL = {
    *("auto_map", "attn_implementation", "linearize", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *PreTrainedConfig().to_dict(),
}


@dataclass(frozen=True)
class Delta:
    """What delta.json says.

    Attributes:
        base: the teacher, pinned by the SHA-256 of its files.
        config: of the teacher, its values by name. linearize: values of the student's `LinearizeConfig`.
        dtype: of the base while the adapter was trained. weights: `fingerprint` of the base in that dtype.
        files: SHA-256 of the adapter's files.
    """

    base: TeacherPin
    config: dict[str, Any]
    linearize: dict[str, Any]
    dtype: str
    weights: str
    files: dict[str, str]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and checksums of every weight that comes from the teacher.

    The same for the teacher, for its student and for the student with adapters that are not merged. The checksums add
    a weight's bytes, read as 64-bit words in lines of 512, along the lines and across them; integers wrap alike on any
    device, so this is exact, in one pass at the memory's speed.
    """
    return fingerprint_of(sorted(_own_weights(model).items()))


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`fingerprint` of weights given one at a time, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        flat = weight.detach().flatten()
        content = (flat.clone() if flat.storage_offset() else flat).view(torch.uint8)
        whole = len(content) // 4096 * 4096
        words = content[:whole].view(torch.int64).view(-1, 512)
        for part in (words.sum(0), words.sum(1), content[whole:]):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _own_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The teacher's weights by the names that the teacher has for them."""
    weights = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if not any(part in name for part in (".lora_", ".feature_maps.")) and not name.startswith("linearized."):
            weights[name] = parameter
    return weights


def save_delta(model: PeftModel, folder: Path | str, base: TeacherPin, weights: str | None = None) -> None:
    """Write adapter_config.json, adapter_model.safetensors and delta.json.

    Args:
        model: what `low_rank_finetune` returned, before `merge_and_unload`.
        base: the teacher that the student was made from.
        weights: its `fingerprint`, where `model` does not hold it as it is (quantized, divided between processes).
    """
    folder = Path(folder)
    student = cast(PreTrainedModel, model.get_base_model())
    adapter: Any = model.peft_config["default"]
    # Where the student was loaded from, if anywhere: AutoPeftModelForCausalLM finds the linearized base by this.
    name = student.name_or_path
    adapter.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    # peft keeps a set, whose order changes from run to run, and with it the file's hash.
    adapter.target_modules = sorted(adapter.target_modules)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    delta = Delta(
        base=base,
        config=_function(student.config),
        linearize=student.config.linearize,
        dtype=str(student.dtype).removeprefix("torch."),
        weights=weights or fingerprint(model),
        files={name: sha256_file(folder / name) for name in (ADAPTER_CONFIG, ADAPTER)},
    )
    write_json(folder / DELTA, dataclasses.asdict(delta))


def read_delta(folder: Path | str) -> Delta:
    """What is written in ``folder/delta.json``.

    Raises:
        UserError: it or the adapter is missing or damaged, or a weight of the adapter is no finite number.
    """
    folder = Path(folder)
    for name in (DELTA, ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it, so it is no delta")
    try:
        values = json.loads((folder / DELTA).read_text(encoding="utf-8"))
        delta = Delta(**{**values, "base": TeacherPin(**values["base"])})
        LinearizeConfig.from_dict(delta.linearize)
        if not isinstance(getattr(torch, delta.dtype), torch.dtype):
            raise ValueError(f"`dtype` must be one of torch's, got {delta.dtype!r}")
        changed = [name for name, digest in delta.files.items() if sha256_file(folder / name) != digest]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {DELTA} is damaged ({reason}); copy the delta again") from None
    if changed:
        raise UserError(f"{folder}: {changed[0]} is not the file that {DELTA} was written for; copy the delta again")
    check_numbers([folder / ADAPTER], str(folder))
    return delta


def load_delta(
    folder: Path | str,
    base: PreTrainedModel | Path | str | None = None,
    *,
    merge: bool = False,
    device: torch.device | str | None = None,
) -> PeftModel | PreTrainedModel:
    """The student of a delta, its adapter on the linearized base or merged into it, bitwise as it was saved.

    Args:
        base: the teacher or a linearized model of it, loaded (the adapter is then put into it) or as a directory; by
            default the one that the delta pins: built in, at its local path, or on the Hugging Face hub.
        merge: give the plain model instead of the adapted one.
        device: by default where the base is; the CPU for one that is loaded here.

    Raises:
        UserError: the delta is missing or damaged, the base is not the one that it was trained on, or an output
            embedding that is tied to the input embeddings was adapted and is to be merged.
    """
    folder = Path(folder)
    delta = read_delta(folder)
    if isinstance(base, PreTrainedModel):
        given, model = base.name_or_path or type(base).__name__, base
        _check_config(folder, delta, base.config, given)
    else:
        path = _pinned(folder, delta) if base is None else Path(base)
        given = delta.base.source if base is None else str(base)
        model = _load_base(folder, delta, path, given)
    if str(model.dtype) != f"torch.{delta.dtype}":
        raise UserError(f"{folder} was trained on {_name(delta)} in {delta.dtype}, but {given} is in {model.dtype}")
    found = fingerprint(model)
    if found != delta.weights:
        expected = f"{_name(delta)} with weights {delta.weights[:12]}"
        raise UserError(f"{folder} belongs on {expected}, but {given} has weights {found[:12]}")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    student = model if _linearized(model.config) else linearize(model, LinearizeConfig.from_dict(delta.linearize))
    student.to(torch.device(device or model.device))  # type: ignore[arg-type]
    adapted = PeftModel.from_pretrained(student, folder, torch_device=str(student.device)).eval()
    if not merge:
        return adapted
    if isinstance(tied_head(student), BaseTunerLayer):
        raise UserError(
            f"{folder} adapts the output embedding, which {_name(delta)} ties to its input embeddings: merged it would"
            " change both, so load it without `merge`"
        )
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):  # merging writes into weights that may still be the teacher's
            layer: Any = module.get_base_layer()
            layer.weight.data = layer.weight.data.clone()
    return cast(PreTrainedModel, cast(Any, adapted).merge_and_unload())


def _pinned(folder: Path, delta: Delta) -> Path:
    """The directory of the base that the delta names."""
    if delta.base.kind == "directory" and not source_path(delta.base.source, Path.cwd()).is_dir():
        raise UserError(
            f"{folder} belongs on {_name(delta)}, which is not at that path here; give its directory as `base`"
        )
    return locate(delta.base, Path.cwd())


def _load_base(folder: Path, delta: Delta, path: Path, given: str) -> PreTrainedModel:
    """The model in a directory, once its configuration fits. A delta is someone's word, so no code is run for it."""
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} belongs on {_name(delta)}, but {given} has no config.json, so it is no model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{given}: config.json is not usable ({' '.join(str(error).split())[:200]})") from None
    _check_config(folder, delta, config, given)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, delta.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{given} does not load ({' '.join(str(error).split())[:200]})") from None
    return cast(PreTrainedModel, model.requires_grad_(False).eval())


def _check_config(folder: Path, delta: Delta, config: PreTrainedConfig, given: str) -> None:
    """Refuse a base of another shape or function, or linearized with other settings."""
    found = _function(config)
    for key in ("model_type", *delta.config):
        if key in found and found[key] != delta.config[key]:
            expected = f"{_name(delta)}, whose `{key}` is {delta.config[key]!r}"
            raise UserError(f"{folder} belongs on {expected}; {given} has {found[key]!r}")
    if _linearized(config):
        check_settings(delta.linearize, cast(Any, config).linearize, folder)


def _linearized(config: PreTrainedConfig) -> bool:
    return config.model_type.startswith(PREFIX)


def _function(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a configuration that decide what the model computes, as the teacher has them."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    kept = {key: value for key, value in values.items() if key not in _INCIDENTAL and not key.startswith("_")}
    return {**kept, "model_type": config.model_type.removeprefix(PREFIX)}


def _name(delta: Delta) -> str:
    """The pinned base in words."""
    pin = delta.base
    which = f"revision {pin.revision[:12]}" if pin.revision else f"files {pin.digest[:12]}"
    return f"{pin.source} ({which})"

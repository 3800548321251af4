"""Linearized models as Hugging Face models: one class per family, made from the family's own, no copied modelling.

A linearized Llama is `LolcatsLlamaForCausalLM`, a subclass of `LlamaForCausalLM` whose attention layers hold
`FeatureMaps` and whose attention function is the hybrid one. Importing this module registers every family with
transformers' Auto classes, so `AutoModelForCausalLM.from_pretrained` loads what `save_pretrained` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_file
from lolcats_common.linearize_config import LinearizeConfig, local_layers, softmax_layers
from lolcats_core.model.attention import ATTENTION_NAME, hybrid_attention_forward
from lolcats_core.model.families import ARCHITECTURES, refusal
from lolcats_core.model.feature_maps import FeatureMaps
from lolcats_core.model.forward_context import prepare_inputs
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.remote_code import auto_map, write_code
from lolcats_core.model.rotary import fuse_rotary
from lolcats_core.model.softmax_attention import SoftmaxWindow

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
PREFIX = "lolcats_"
# Settings that decide where training starts and nothing after it.
INITIAL = ("init_window_factor", "feature_map_init")
# Besides, settings of the kept heads, which attention transfer does not look at.
NOT_OF_MAPS = (*INITIAL, "softmax_window", "softmax_sinks")

transformers.AttentionInterface.register(ATTENTION_NAME, hybrid_attention_forward)


class LinearizedMixin:
    """What a linearized model has besides its family's class."""

    _keep_in_fp32_modules_strict = ("feature_maps",)
    # The state sums over the past, so decoding that takes tokens back is refused by `generate`.
    _is_stateful = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.config: PreTrainedConfig = config
        config._attn_implementation = ATTENTION_NAME
        settings = LinearizeConfig.from_dict(config.linearize)
        for layer in attention_layers(cast(nn.Module, self)):
            local = layer.layer_idx in local_layers(config)
            window = SoftmaxWindow(settings.softmax_window, settings.softmax_sinks)
            layer.softmax_window = SoftmaxWindow() if local else window
            fuse_rotary(layer)
            if layer.layer_idx not in softmax_layers(config):
                head_dim = layer.head_dim if hasattr(layer, "head_dim") else layer.head_size
                groups = KVGroups(kv_heads(config), settings.softmax_heads.get(layer.layer_idx, ()))
                layer.feature_maps = FeatureMaps(settings, groups, config.num_attention_heads // groups.count, head_dim)
        # A frozen zero that only linearized models have. Adapters name it (`finetune.add_lora`), so that peft itself
        # refuses to put them onto the softmax teacher, whose other modules have the same names.
        self.linearized = nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
        cast(PreTrainedModel, self).base_model.register_forward_pre_hook(prepare_inputs, with_kwargs=True)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """A linearized model has one attention function.

        Raises:
            UserError: another one is asked for.
        """
        if attn_implementation != ATTENTION_NAME:
            raise UserError(f"a linearized model's attention is {ATTENTION_NAME}, got {attn_implementation!r}")

    def save_pretrained(self, save_directory: Path | str, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the code beside the weights (`trust_remote_code` loads it without this package)."""
        config_class, model_class = type(self.config).__name__, type(self).__name__
        self.config.auto_map = auto_map(config_class, model_class)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_code(save_directory, [config_class, model_class])

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint without feature maps is refused instead of drawing them at random."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(name for name in info["missing_keys"] if ".feature_maps." in name)
        if missing:
            raise UserError(f"{args[0] if args else 'the checkpoint'} has no {missing[0]}: not a linearized model")
        return (model, info) if wanted else model


def _family(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    base_config, base_model = FAMILIES[name]
    config_name, model_name = f"Lolcats{base_config.__name__}", f"Lolcats{base_model.__name__}"
    config = type(
        config_name,
        (base_config,),
        {
            "__module__": __name__,
            "__doc__": f"{base_config.__name__} with `linearize`, the values of a `LinearizeConfig`.",
            "__annotations__": {"linearize": dict | None},
            "linearize": None,
            "model_type": PREFIX + name,
        },
    )
    model = type(
        model_name,
        (LinearizedMixin, base_model),
        {"__module__": __name__, "__doc__": f"{base_model.__name__} with hybrid attention.", "config_class": config},
    )
    globals()[config_name], globals()[model_name] = config, model
    # The copy of this code beside a checkpoint registers as well.
    AutoConfig.register(PREFIX + name, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


LINEARIZED = {name: _family(name) for name in FAMILIES}


def supported_architectures() -> tuple[str, ...]:
    """The `model_type` of every family that can be linearized."""
    return ARCHITECTURES


def check_architecture(config: PreTrainedConfig, settings: LinearizeConfig) -> None:
    """Refuse what cannot be linearized before any weight is loaded.

    Raises:
        UserError: the architecture cannot be linearized (with the reason), or `settings` do not fit its shape.
    """
    if config.model_type.startswith(PREFIX):
        raise UserError(f"the teacher is already a linearized model ({config.model_type}); give its softmax original")
    reason = refusal(config.to_dict())
    if reason is not None:
        raise UserError(reason)
    layers, groups = config.num_hidden_layers, kv_heads(config)
    for name in ("softmax_layers", "softmax_heads"):
        beyond = [layer for layer in getattr(settings, name) if layer >= layers]
        if beyond:
            raise UserError(f"`{name}` must be below the {layers} layers, got {beyond[0]}")
    for layer, kept in settings.softmax_heads.items():
        if layer in local_layers(config):
            raise UserError(
                f"layer {layer} in `softmax_heads` is a local layer, which keeps softmax attention as it is"
            )
        if kept[-1] >= groups:
            raise UserError(f"`softmax_heads` of layer {layer} must be below its {groups} kv heads, got {kept[-1]}")
        if len(kept) == groups:
            raise UserError(f"`softmax_heads` names every kv head of layer {layer}; put it into `softmax_layers`")
    own = None if local_layers(config) else getattr(config, "sliding_window", None)
    if settings.softmax_window is not None and own is not None and settings.softmax_window >= own:
        raise UserError(
            f"`softmax_window` must be below the teacher's own sliding window of {own}, got {settings.softmax_window}"
        )


def kv_heads(config: PreTrainedConfig) -> int:
    """Key/value heads of each layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_layers(model: nn.Module) -> list[Any]:
    """The attention modules in order of depth."""
    layers = cast(Any, model).base_model.layers
    return [layer.self_attn if hasattr(layer, "self_attn") else layer.attention for layer in layers]


def feature_maps(model: nn.Module) -> dict[str, FeatureMaps]:
    """Every layer's `FeatureMaps` by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeatureMaps)}


def check_settings(
    saved: dict[str, Any], model: dict[str, Any], source: Path | str, free: tuple[str, ...] = INITIAL
) -> None:
    """Refuse parameters trained under other settings; those that only choose initial values may differ.

    Args:
        saved: the values of the `LinearizeConfig` that `source` was made with; `model`: those of the model.
        free: settings that may differ.

    Raises:
        UserError: naming the first setting that differs and both values.
    """
    try:
        made, wanted = LinearizeConfig.from_dict(saved).to_dict(), LinearizeConfig.from_dict(model).to_dict()
    except TypeError as error:
        raise UserError(f"{source}: made by another version of this package ({error})") from None
    for key, value in wanted.items():
        if made[key] != value and key not in free:
            raise UserError(f"{source}: made with `{key}` {made[key]!r}, but the model has {value!r}")


def named_map_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that linearizing added, by its name in the model."""
    return {f"{name}.{key}": p for name, maps in feature_maps(model).items() for key, p in maps.named_parameters()}


def empty_student(teacher: PreTrainedConfig, settings: LinearizeConfig) -> PreTrainedModel:
    """A linearized model of the teacher's shape with fresh weights on the current device (``meta`` costs nothing).

    Raises:
        UserError: the architecture or the settings do not fit.
    """
    check_architecture(teacher, settings)
    config_class, model_class = LINEARIZED[teacher.model_type]
    # The student is not the checkpoint that its teacher came from, so it does not take over that name.
    dropped = ("model_type", "architectures", "_name_or_path")
    values = {key: value for key, value in teacher.to_dict().items() if key not in dropped}
    return model_class(config_class(**values, linearize=settings.to_dict()))  # type: ignore[call-arg]


def initial_feature_maps(
    teacher: PreTrainedConfig, settings: LinearizeConfig, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The values that `linearize` gives the maps of a model of the teacher's shape, by their names, on the CPU.

    Raises:
        UserError: the architecture or the settings do not fit.
    """
    with torch.device("meta"):
        student = empty_student(teacher, settings)
    generator = torch.Generator().manual_seed(seed)
    for maps in feature_maps(student).values():
        maps.to_empty(device="cpu").reset_parameters(generator)
    return {name: p.detach() for name, p in named_map_parameters(student).items()}


def linearize(model: PreTrainedModel, config: LinearizeConfig, seed: int = 0) -> PreTrainedModel:
    """A linearized copy of `model` that shares its weights.

    Args:
        model: a causal language model of a supported family.
        seed: of the feature maps' initial values.

    Returns:
        The student, in which only the feature maps (float32) are trainable. The teacher is not changed.

    Raises:
        UserError: the architecture or the settings do not fit.
    """
    with torch.device("meta"):
        student = empty_student(model.config, config)
    student.load_state_dict(model.state_dict(), strict=False, assign=True)
    buffers = dict(model.named_buffers())
    for name, module in student.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, key, buffers[f"{name}.{key}"])
    cast(nn.Embedding, student.linearized).to_empty(device=model.device).weight.data.zero_()
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in attention_layers(student):
        maps = getattr(layer, "feature_maps", None)
        if maps is not None:
            maps.to_empty(device=model.device)
            maps.reset_parameters(generator)
            maps.requires_grad_(True)
    student.tie_weights()
    student.generation_config = model.generation_config
    return student.eval()


def save_feature_maps(student: PreTrainedModel, path: Path | str) -> None:
    """Write every layer's maps and factors to one safetensors file, with the settings as metadata."""
    write_feature_maps(named_map_parameters(student), LinearizeConfig.from_dict(student.config.linearize), path)


def write_feature_maps(maps: Mapping[str, torch.Tensor], settings: LinearizeConfig, path: Path | str) -> None:
    """The file of `save_feature_maps` from the maps by their names in the model."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in maps.items()}
    # One entry: safetensors writes several in an order that changes from run to run, and with it the file's hash.
    metadata = {"linearize": json.dumps(settings.to_dict(), sort_keys=True)}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


@torch.no_grad()
def load_feature_maps(student: PreTrainedModel, path: Path | str) -> None:
    """Copy the maps and factors of `save_feature_maps` into `student`.

    Raises:
        UserError: the file is missing or damaged, or belongs to another configuration.
    """
    tensors = read_feature_maps(path, student.config.linearize)
    expected = named_map_parameters(student)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise UserError(f"{path}: feature maps of another model or configuration ({odd} does not match)")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)} instead of {tuple(parameter.shape)}"
            raise UserError(f"{path}: {name} is {shapes}; made with other `linearize` parameters")
        parameter.copy_(tensors[name])


def restrict_maps(maps: Mapping[str, torch.Tensor], made: nn.Module, kept: nn.Module) -> dict[str, torch.Tensor]:
    """The maps of `made`'s kv groups that are linearized in `kept` as well, in which more groups keep softmax.

    Args:
        maps: by their names in `made`. Every parameter of `FeatureMaps` has the heads, by kv groups, in front.
        made, kept: linearized models of one teacher; their weights are not looked at.
    """
    before, found = feature_maps(made), {}
    for name, module in feature_maps(kept).items():
        groups = before[name].groups.linear
        places = [groups.index(group) for group in module.groups.linear]
        for key, _ in module.named_parameters():
            by_group = maps[f"{name}.{key}"].unflatten(0, (len(groups), -1))
            found[f"{name}.{key}"] = by_group[places].flatten(0, 1)
    return found


def read_feature_maps(path: Path | str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `save_feature_maps` by their names in the model.

    Args:
        settings: the values of the `LinearizeConfig` that they must have been made with.

    Raises:
        UserError: the file is missing or damaged, or was made with other settings.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {})["linearize"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run stage `transfer` first") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); run stage `transfer` again") from None
    except (KeyError, ValueError):
        raise UserError(f"{path}: no `linearize` settings in it; not written by `save_feature_maps`") from None
    check_settings(made, settings, path, NOT_OF_MAPS)
    return tensors

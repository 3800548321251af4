"""Linearized models as Hugging Face models: classes made from the family's own, no copied modelling.

A linearized Llama is `LolcatsLlamaForCausalLM`, a subclass of `LlamaForCausalLM` whose attention layers hold
`FeatureMaps` and whose attention function is the hybrid one. Importing this module registers every family with
transformers' Auto classes, so `AutoModelForCausalLM.from_pretrained` loads what `save_pretrained` wrote, as do
`AutoModel` (the decoder alone) and, where the family has it, `AutoModelForSequenceClassification` (with a new head).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, kv_heads, local_layers
from lolcats_core.model.attention import hybrid_attention_forward
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.families import FAMILIES, PREFIX, VISION, family_of, modality, refusal
from lolcats_core.model.feature_maps import FeatureMaps
from lolcats_core.model.forward_context import (
    ATTENTION_NAME,
    check_attention,
    checkpoints,
    function_name,
    prepare_inputs,
)
from lolcats_core.model.remote_code import MODEL, auto_map, write_code
from lolcats_core.model.rotary import changing_frequencies, fuse_rotary, layer_rotary
from lolcats_core.model.softmax_attention import KeptGroups
from lolcats_core.model.transformers_versions import CACHE, given_cache

logger = logging.get_logger(__name__)

transformers.AttentionInterface.register(function_name(ATTENTION_NAME), hybrid_attention_forward)


class StudentMixin:
    """What a linearized model of any modality has besides its family's class.

    Attributes:
        attention_name: its attention function, registered with transformers. code: the module that a saved model needs.
    """

    attention_name = ATTENTION_NAME
    code = MODEL
    _keep_in_fp32_modules_strict = ("feature_maps",)
    linearized: nn.Embedding

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation is not None:
            check_attention(config._attn_implementation, self.attention_name)
        if config.linearize is None:
            raise UserError(f"`config` of {type(self).__name__} has no `linearize`: not that of a linearized model")
        config._attn_implementation = function_name(self.attention_name)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.config: PreTrainedConfig = config

    def mark(self) -> None:
        """Add a frozen zero that only linearized models have.

        Adapters name it (`finetune.add_lora`), so that peft itself refuses to put them onto the softmax teacher, whose
        other modules have the same names.
        """
        self.linearized = nn.Embedding(1, 1, _weight=torch.zeros(1, 1)).requires_grad_(False)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """A linearized model has one attention function.

        Raises:
            UserError: another one is asked for.
        """
        check_attention(attn_implementation, self.attention_name)

    def save_pretrained(self, save_directory: Path | str, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the code beside the weights (`trust_remote_code` loads it without this package)."""
        classes = self.auto_classes()
        self.config.auto_map = auto_map(classes)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_code(save_directory, classes.values(), self.code)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint without feature maps is refused instead of drawing them at random."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(name for name in info["missing_keys"] if ".feature_maps." in name)
        if missing:
            raise UserError(f"{args[0] if args else 'the checkpoint'} has no {missing[0]}: not a linearized model")
        model.linearized.requires_grad_(False)  # loading leaves every parameter trainable
        return (model, info) if wanted else model

    def auto_classes(self) -> dict[str, type]:
        """What the saved model says of the classes that load it, by the names of the Auto classes that find them."""
        return auto_classes(self.config)


class LinearizedMixin(StudentMixin):
    """What a linearized causal decoder has besides its family's class."""

    # The state sums over the past, so decoding that takes tokens back is refused by `generate`.
    _is_stateful = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        decoder = cast(PreTrainedModel, self).base_model
        if decoder is not self and isinstance(decoder, LinearizedMixin):
            # transformers makes the decoder of some heads through `AutoModel`; one more module belongs to the whole.
            self.linearized = decoder.linearized
            del decoder.linearized
            return
        settings = LinearizeConfig.from_dict(config.linearize)
        family, decoder = family_of(config), cast(PreTrainedModel, self).base_model
        for layer in attention_layers(cast(nn.Module, self)):
            kept = layer.kept = KeptGroups.of(config, layer.layer_idx)
            if not family.rotary_interleaved:
                fuse_rotary(layer)
            if kept.groups.linear:
                queries = config.num_attention_heads // kept.groups.count
                maps = FeatureMaps(settings, kept.groups, queries, getattr(layer, family.head_dim))
                maps.rotary = layer_rotary(decoder, layer, family)
                layer.feature_maps = maps
        self.mark()
        decoder.register_forward_pre_hook(prepare_inputs, with_kwargs=True)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What `generate` keeps between its steps: the given cache, or a new `HybridCache`.

        Raises:
            UserError: another kind of cache is asked for.
        """
        asked, usual = generation_config.cache_implementation, self.generation_config.cache_implementation  # type: ignore[attr-defined]
        if asked not in (None, usual):
            raise UserError(f"`cache_implementation` of a linearized model must be None, got {asked!r}")
        if asked is not None:
            # Some teachers name one, and their students inherit it.
            logger.warning_once(f"a linearized model's cache is a HybridCache; {asked!r} has no effect")
            generation_config.cache_implementation = None
        if generation_config.use_cache and checkpoints(cast(PreTrainedModel, self).base_model):
            logger.warning_once("gradient checkpointing leaves no cache: `generate` reads the whole text at every step")
            generation_config.use_cache = False
        if generation_config.use_cache is not False and given_cache(model_kwargs) is None:
            model_kwargs[CACHE] = HybridCache(self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


class LinearizedConfigMixin:
    """What the configuration of a linearized model has besides its family's class."""

    attention_name = ATTENTION_NAME

    def to_diff_dict(self) -> dict[str, Any]:
        """The values in config.json; the attention function among them makes the softmax classes refuse the file."""
        return {**super().to_diff_dict(), "attn_implementation": self.attention_name}  # type: ignore[misc]


def _linearized(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    base_config, base_model = FAMILIES[name].resolve()
    config_name = f"Lolcats{base_config.__name__}"
    config = type(
        config_name,
        (LinearizedConfigMixin, base_config),
        {
            "__module__": __name__,
            "__doc__": f"{base_config.__name__} with `linearize`, the values of a `LinearizeConfig`.",
            "__annotations__": {"linearize": dict | None},
            "linearize": None,
            "model_type": PREFIX + name,
        },
    )
    globals()[config_name] = config
    if __name__.startswith("lolcats_core."):
        # The copy of this code beside a checkpoint serves that checkpoint alone: what is registered for a model type
        # stands for every later checkpoint of that type, whose own code would not be read.
        AutoConfig.register(PREFIX + name, config, exist_ok=True)
    AUTO_CLASSES[PREFIX + name] = {"AutoConfig": config}
    bases: dict[Any, type[PreTrainedModel] | None] = {
        AutoModelForCausalLM: base_model,
        AutoModel: cast(Any, MODEL_MAPPING).get(base_config, None),
        AutoModelForSequenceClassification: cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING).get(base_config, None),
    }
    for auto, base in bases.items():
        if base is not None:
            names = {"__module__": __name__, "__doc__": f"{base.__name__} with hybrid attention."}
            model = type(f"Lolcats{base.__name__}", (LinearizedMixin, base), {**names, "config_class": config})
            globals()[model.__name__] = AUTO_CLASSES[PREFIX + name][auto.__name__] = model
            auto.register(config, model, exist_ok=True)
    return config, globals()[f"Lolcats{base_model.__name__}"]


# By `model_type`, the classes of a linearized family by the Auto classes that find them.
AUTO_CLASSES: dict[str, dict[str, type]] = {}
# By the teacher's `model_type`.
LINEARIZED = {name: _linearized(name) for name in FAMILIES}
# By the teacher's class, of those families that have several; `vision.modeling` adds its own here and above.
OTHER_KINDS: dict[str, type[PreTrainedModel]] = {}


def auto_classes(config: PreTrainedConfig) -> dict[str, type]:
    """The classes of a linearized model's family by the names of the Auto classes that find them."""
    return AUTO_CLASSES[config.model_type]


def supported_architectures() -> tuple[str, ...]:
    """The `model_type` of every family that can be linearized."""
    return (*FAMILIES, *VISION)


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
    if modality(config.to_dict()) == "image":
        settings.check_images()
    else:
        settings.check_text()
    layers, groups = config.num_hidden_layers, kv_heads(config)
    for name in ("softmax_layers", "softmax_heads", "softmax_windows"):
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
    changing = changing_frequencies(config)
    if settings.feature_positions == "unrotated" and changing is not None:
        raise UserError(
            f"`feature_positions: unrotated` needs rotary embeddings with fixed frequencies, got rope_type {changing!r}"
        )
    for layer, windows in settings.softmax_windows.items():
        if layer in local_layers(config):
            raise UserError(f"layer {layer} in `softmax_windows` is a local layer, which has a window of its own")
        if max(windows) >= groups:
            raise UserError(
                f"`softmax_windows` of layer {layer} must be below its {groups} kv heads, got {max(windows)}"
            )
    own = None if local_layers(config) else getattr(config, "sliding_window", None)
    sizes = {f"`softmax_windows` of layer {i}": max(sizes.values()) for i, sizes in settings.softmax_windows.items()}
    for name, size in {"`softmax_window`": settings.softmax_window, **sizes}.items():
        if size is not None and own is not None and size >= own:
            raise UserError(f"{name} must be below the teacher's own sliding window of {own}, got {size}")


def attention_layers(model: nn.Module) -> list[Any]:
    """The attention modules of a causal decoder in order of depth."""
    causal = cast(Any, model)
    name = family_of(causal.config).attention
    return [getattr(layer, name) for layer in causal.base_model.layers]


def feature_maps(model: nn.Module) -> dict[str, FeatureMaps]:
    """Every layer's `FeatureMaps` by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeatureMaps)}


def named_map_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that linearizing added, by its name in the model."""
    return {f"{name}.{key}": p for name, maps in feature_maps(model).items() for key, p in maps.named_parameters()}


def tied_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a causal language model where its weight is that of the input embedding."""
    plain = cast(Any, model)
    head: nn.Module = plain.get_output_embeddings()
    return head if head.weight is plain.get_input_embeddings().weight else None


def empty_student(
    teacher: PreTrainedConfig, settings: LinearizeConfig, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A linearized model of the teacher's shape with fresh weights on the current device (``meta`` costs nothing).

    Args:
        kind: the teacher's class, where its family has several that can be linearized (a backbone, a classifier).

    Raises:
        UserError: the architecture or the settings do not fit.
    """
    check_architecture(teacher, settings)
    config_class, model_class = LINEARIZED[teacher.model_type]
    if kind is not None and kind.__name__ in OTHER_KINDS:
        model_class = OTHER_KINDS[kind.__name__]
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
        model: a causal language model, or a vision transformer with or without a classifier, of a supported family.
        seed: of the feature maps' initial values.

    Returns:
        The student, in which only the feature maps (float32) are trainable. The teacher is not changed.

    Raises:
        UserError: the architecture or the settings do not fit.
    """
    with torch.device("meta"):
        student = empty_student(model.config, config, type(model))
    missing = student.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    absent = [name for name in missing if ".feature_maps." not in name and not name.startswith("linearized.")]
    if absent:
        kind = "causal language model" if student.can_generate() else type(student).__name__.removeprefix("Lolcats")
        raise UserError(f"`model` must be a {kind}; {type(model).__name__} has no {absent[0]}")
    buffers = dict(model.named_buffers())
    for name, module in student.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, key, buffers[f"{name}.{key}"])
    cast(nn.Embedding, student.linearized).to_empty(device=model.device).weight.data.zero_()
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for maps in feature_maps(student).values():
        maps.to_empty(device=model.device)
        maps.reset_parameters(generator)
        maps.requires_grad_(True)
    student.tie_weights()
    if model.can_generate():
        student.generation_config = model.generation_config
    return student.eval()

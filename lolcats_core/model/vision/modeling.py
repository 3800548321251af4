"""Linearized vision transformers as Hugging Face models: classes made from the family's own, no copied modelling.

A linearized DINOv2 is `LolcatsDinov2Model`, or with a classifier `LolcatsDinov2ForImageClassification`. Importing this
module registers every family with transformers' Auto classes, so `AutoModel` and `AutoModelForImageClassification` load
what `save_pretrained` wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS,
)
from transformers import (
    MODEL_MAPPING,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.data.images import ImageRows
from lolcats_core.model.families import PREFIX, VISION, vision_family_of
from lolcats_core.model.feature_maps import FeatureMaps
from lolcats_core.model.forward_context import LayerObserver, check_attention, function_name
from lolcats_core.model.modeling import AUTO_CLASSES, LINEARIZED, OTHER_KINDS, LinearizedConfigMixin, StudentMixin
from lolcats_core.model.softmax_attention import KeptGroups
from lolcats_core.model.vision.attention import IMAGE_ATTENTION, image_attention_forward
from lolcats_core.model.vision.context import ImagePass, grid_of, patch_grid, prefix_tokens

Images = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
transformers.AttentionInterface.register(function_name(IMAGE_ATTENTION), image_attention_forward)
# Kept heads are given the masks that transformers makes for its own function.
AttentionMaskInterface.register(function_name(IMAGE_ATTENTION), sdpa_mask)


class LinearizedVisionMixin(StudentMixin):
    """What a linearized vision transformer has besides its family's class.

    Attributes:
        image_pass: what its layers share in a pass. auto: the Auto class that finds it.
    """

    auto: str
    attention_name = IMAGE_ATTENTION
    code = "lolcats_core.model.vision.modeling"

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings, self.image_pass = LinearizeConfig.from_dict(config.linearize), ImagePass()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for index, layer in enumerate(image_layers(cast(nn.Module, self))):
            kept = layer.kept = KeptGroups.of(config, index)
            layer.layer_idx, layer.image_pass = index, self.image_pass
            if kept.groups.linear:
                layer.feature_maps = FeatureMaps(settings, kept.groups, 1, head_dim)
        self.mark()
        backbone(cast(nn.Module, self)).register_forward_pre_hook(self._prepare_images, with_kwargs=True)

    def _prepare_images(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the backbone: note where the patches of this pass stand.

        Raises:
            UserError: another attention function, attention weights, or a mask over tokens is asked for.
        """
        check_attention(self.config._attn_implementation, self.attention_name)
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UserError(
                "`output_attentions` of a linearized model must be False: it never builds attention weights"
            )
        if kwargs.get("attention_mask") is not None:
            raise UserError("`attention_mask` of a linearized vision transformer must be None: its images are whole")
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        self.image_pass.grid = grid_of(self.config, dict(zip(names, args, strict=False)) | kwargs)

    def auto_classes(self) -> dict[str, type]:
        """As of any student; where a family has several classifiers (DeiT), the one that this model is."""
        return super().auto_classes() | {self.auto: type(self)}


class LinearizedVisionConfigMixin(LinearizedConfigMixin):
    """What the configuration of a linearized vision transformer has besides its family's class."""

    attention_name = IMAGE_ATTENTION


def backbone(model: nn.Module) -> Any:
    """The vision transformer inside a model with a head, or the model itself."""
    plain = cast(Any, model)
    base = BACKBONES[plain.config.model_type.removeprefix(PREFIX)]
    return next(module for module in plain.modules() if isinstance(module, base))


def attention_blocks(model: nn.Module) -> list[Any]:
    """Each layer's attention with all its projections, in order of depth."""
    family = vision_family_of(cast(Any, model).config)
    return [getattr(layer, family.attention) for layer in backbone(model).get_submodule(family.layers)]


def image_layers(model: nn.Module) -> list[Any]:
    """The modules that call the attention function, in order of depth."""
    # In transformers 5.17 DINOv2's first three projections lie one module deeper than the output's.
    return [getattr(block, "attention", block) for block in attention_blocks(model)]


@contextlib.contextmanager
def observed(student: nn.Module, observer: LayerObserver) -> Iterator[None]:
    """Inside the block, passes are the teacher's, and each linearized layer is shown to `observer`."""
    shared: ImagePass = cast(Any, student).image_pass
    before, shared.observer = shared.observer, observer
    try:
        yield
    finally:
        shared.observer = before


def image_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a batch hands to the model: images of another size than the configuration's have their positions fitted."""
    config = cast(Any, model).config
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    if vision_family_of(config).interpolates:
        size = config.image_size
        usual = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(inputs["pixel_values"].shape[-2:]) != usual:
            inputs["interpolate_pos_encoding"] = True
    return inputs


def image_rows(model: nn.Module, images: Images, labels: Tensor | None = None) -> ImageRows:
    """Images as rows for a model to train on.

    Args:
        images: pixel_values [N, C, height, width]; or what the model's processor returns; or an iterable of either,
            which is read to its end. labels: int64 [N], or None.

    Raises:
        UserError: no image, columns that do not fit, or an image with less than one patch.
    """
    parts = [images] if isinstance(images, Tensor | Mapping) else list(images)
    columns = [{"pixel_values": part} if isinstance(part, Tensor) else dict(part) for part in parts]
    if not columns:
        raise UserError("`images` must hold an image, got none")
    joined = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    if labels is not None:
        joined["labels"] = labels
    config, pixels = cast(Any, model).config, joined["pixel_values"]
    if vision_family_of(config).packed:
        return ImageRows(joined, prefix_tokens(config) + pixels.shape[1])
    if pixels.dim() != 4:
        raise UserError(f"`pixel_values` must be [N, C, height, width], got {tuple(pixels.shape)}")
    rows, across = patch_grid(config, *pixels.shape[-2:])
    if rows * across == 0:
        size = "{} x {}".format(*pixels.shape[-2:])
        raise UserError(f"images must have a patch of {config.patch_size} pixels at least, got {size}")
    return ImageRows(joined, prefix_tokens(config) + rows * across)


@torch.no_grad()
def show_images(student: nn.Module, batch: Mapping[str, Tensor], observer: LayerObserver) -> None:
    """Pass images through the backbone with the teacher's outputs, each linearized layer shown to `observer`."""
    with observed(student, observer):
        backbone(student)(**image_inputs(student, batch))


def _linearized(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    base_config = getattr(transformers, VISION[name].config)
    config_name = f"Lolcats{base_config.__name__}"
    config = type(
        config_name,
        (LinearizedVisionConfigMixin, base_config),
        {
            "__module__": __name__,
            "__doc__": f"{base_config.__name__} with `linearize`, the values of a `LinearizeConfig`.",
            "__annotations__": {"linearize": dict | None},
            "linearize": None,
            "model_type": PREFIX + name,
        },
    )
    globals()[config_name] = config
    if __name__.startswith("lolcats_core."):  # as for text: a checkpoint's copy serves that checkpoint alone
        AutoConfig.register(PREFIX + name, config, exist_ok=True)
    AUTO_CLASSES[PREFIX + name] = {"AutoConfig": config}
    BACKBONES[name] = cast(Any, MODEL_MAPPING)[base_config]
    for auto, mapping in ((AutoModel, MODEL_MAPPING), (AutoModelForImageClassification, CLASSIFIERS)):
        found = cast(Any, mapping).get(base_config, ())
        models = [
            _student_class(base, config, auto.__name__) for base in (found if isinstance(found, tuple) else (found,))
        ]
        if models:
            AUTO_CLASSES[PREFIX + name][auto.__name__] = models[0]
            # Of several classes transformers takes the one that a checkpoint names.
            auto.register(config, cast(Any, tuple(models) if len(models) > 1 else models[0]), exist_ok=True)
    return config, OTHER_KINDS[BACKBONES[name].__name__]


def _student_class(base: type[PreTrainedModel], config: type[PreTrainedConfig], auto: str) -> type[PreTrainedModel]:
    values = {"__module__": __name__, "__doc__": f"{base.__name__} with attention that is linear in the patches."}
    model = type(
        f"Lolcats{base.__name__}", (LinearizedVisionMixin, base), {**values, "config_class": config, "auto": auto}
    )
    globals()[model.__name__] = OTHER_KINDS[base.__name__] = model
    return cast(type[PreTrainedModel], model)


# The softmax backbone of each family, by the teacher's `model_type`.
BACKBONES: dict[str, type[PreTrainedModel]] = {}
LINEARIZED |= {name: _linearized(name) for name in VISION}

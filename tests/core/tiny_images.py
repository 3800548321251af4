"""Tiny random vision transformers and images for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import MODEL_MAPPING as BACKBONES

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.families import VISION
from lolcats_core.model.modeling import linearize, named_map_parameters

CLASSES = 5
SETTINGS = LinearizeConfig(window="none", feature_dim=8)
# One layer of each kind: linearized, softmax, and both in one.
MIXED = dataclasses.replace(SETTINGS, softmax_layers=(1,), softmax_heads={2: (1, 3)})
TILED = dataclasses.replace(MIXED, window="tiled", window_size=4)


def teacher_classes(family: str) -> list[Any]:
    """The backbone and the classifiers of a family."""
    config = getattr(transformers, VISION[family].config)
    found = CLASSIFIERS.get(config, ())
    return [BACKBONES[config], *(found if isinstance(found, tuple) else [found])]


def tiny_teacher(family: str = "dinov2", kind: int = 0, seed: int = 0, **changes: Any) -> Any:
    """A random model of `family`: 3 layers, 4 heads of 8, 5 x 5 patches of 8 x 8 pixels; `kind` of its classes."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 40,
        "patch_size": 8,
        "num_labels": CLASSES,
        "initializer_range": 0.2,
    }
    if family == "dinov3_vit":
        values["num_register_tokens"] = 2
    if family == "siglip2_vision_model":
        values["num_patches"] = 25
        del values["image_size"]
    torch.manual_seed(seed)
    return teacher_classes(family)[kind](getattr(transformers, VISION[family].config)(**values | changes)).eval()


def tiny_student(family: str = "dinov2", settings: LinearizeConfig = MIXED, **changes: Any) -> Any:
    """`tiny_teacher(family, **changes)`, linearized with maps and factors that are not their initial values."""
    model = linearize(tiny_teacher(family, **changes), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in named_map_parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn - 1 if name.endswith("window_factor") else parameter + 0.3 * drawn)
    return model


def images(family: str = "dinov2", count: int = 2, seed: int = 0, size: int = 40) -> dict[str, torch.Tensor]:
    """What the model takes; NaFlex images have sizes of their own and padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    if not VISION[family].packed:
        return {"pixel_values": torch.randn(count, 3, size, size, generator=generator)}
    shapes = torch.tensor([[5, 5], [3, 7], [4, 4]])[torch.arange(count) % 3]
    mask = (torch.arange(25) < shapes.prod(1)[:, None]).long()
    pixels = torch.randn(count, 25, 192, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def output(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a classifier, hidden states of a backbone; rows of padding left out."""
    with torch.no_grad():
        out = model(**batch)
    if "logits" in out:
        return out.logits
    hidden = out.last_hidden_state
    return hidden[batch["pixel_attention_mask"].bool()] if "pixel_attention_mask" in batch else hidden

"""Feature maps on disk: written, read against the settings they were made with, and cut down to what stays linear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_file
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.compute.numbers import check_finite
from lolcats_core.model.modeling import feature_maps, named_map_parameters

# Settings that decide where training starts and nothing after it.
INITIAL = ("init_window_factor", "feature_map_init")
# Besides, settings of the kept heads, which attention transfer does not look at.
NOT_OF_MAPS = (*INITIAL, "softmax_window", "softmax_windows", "softmax_sinks")


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
    before, restricted = feature_maps(made), {}
    for name, module in feature_maps(kept).items():
        groups = before[name].groups.linear
        indices = [groups.index(group) for group in module.groups.linear]
        for key, _ in module.named_parameters():
            by_group = maps[f"{name}.{key}"].unflatten(0, (len(groups), -1))
            restricted[f"{name}.{key}"] = by_group[indices].flatten(0, 1)
    return restricted


def read_feature_maps(path: Path | str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `save_feature_maps` by their names in the model.

    Args:
        settings: the values of the `LinearizeConfig` that they must have been made with.

    Raises:
        UserError: the file is missing or damaged, holds NaN or infinite values, or was made with other settings.
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
    check_finite(tensors, str(path))
    return tensors


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

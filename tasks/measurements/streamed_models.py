"""The models of stage `evaluate` where they do not fit the device: their perplexity, from files, layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.data.rows import TokenRows
from lolcats_core.estimation.memory import device_memory, evaluated_by_layers
from lolcats_core.estimation.shapes import ModelShape
from lolcats_core.evaluation.streamed_perplexity import open_sweep, streamed_perplexity
from lolcats_core.model.map_files import write_feature_maps
from lolcats_core.model.modeling import initial_feature_maps
from lolcats_core.streaming.layerwise import Sweep
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.perplexity import PerplexityResult
from tasks.runner.artifacts import selected
from tasks.runner.stage import Stage

# What needs a model that is there as a whole, by its parameter, and the value that leaves it out.
NEEDS_WHOLE = {"recall_gaps": (), "tasks": (), "long_rows": 0, "generation_prompts": 0, "audit_rows": 0}


def needed(stage: Stage, teacher: Teacher, device: torch.device) -> bool:
    """Whether the teacher's weights leave no room on `device`."""
    return evaluated_by_layers(stage.params, ModelShape.from_config(teacher.config), device_memory(device))


class StreamedModels:
    """The model at each step (see `measurements.Models`) as files; no more than a layer is on the device."""

    def __init__(self, stage: Stage, teacher: Teacher, device: torch.device, dtype: torch.dtype) -> None:
        self.stage, self.teacher, self.device, self.dtype = stage, teacher, device, dtype

    def perplexity(self, step: str, rows: TokenRows) -> PerplexityResult:
        """Next-token perplexity over the rows that `evaluate` measures it on."""
        params, sweep = self.stage.params.evaluate, self._open(step)
        try:
            return streamed_perplexity(
                sweep,
                rows,
                batch_size=params.batch_size,
                max_rows=params.max_perplexity_rows,
                folder=self.stage.scratch / "hidden",
                name=f"the {step} model",
            )
        finally:
            sweep.close()

    def _open(self, step: str) -> Sweep:
        stage, where = self.stage, {"device": self.device, "dtype": self.dtype}
        if step == "finetuned":
            folder = stage.input("finetune") / "model"
            return open_sweep(folder, AutoConfig.from_pretrained(folder), **where)  # type: ignore[arg-type]
        config, folder, (settings, trained) = self.teacher.config, self.teacher.folder, selected(stage)
        if step == "teacher":
            return open_sweep(folder, config, **where)  # type: ignore[arg-type]
        maps = trained if step == "transferred" else self._untrained(config, settings)
        return open_sweep(folder, config, settings=settings, maps=maps, **where)  # type: ignore[arg-type]

    def _untrained(self, config: PreTrainedConfig, settings: LinearizeConfig) -> Path:
        path = self.stage.scratch / "untrained.safetensors"
        write_feature_maps(initial_feature_maps(config, settings, self.stage.params.seed), settings, path)
        return path

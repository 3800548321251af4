"""The models that stage `evaluate` measures: whole, or by layers from their files where they do not fit the device."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.progress import progress
from lolcats_core import linearize, load_feature_maps, low_rank_finetune
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.compute.numbers import check_folder
from lolcats_core.data.rows import TokenRows, open_split
from lolcats_core.estimation.memory import ModelShape, device_memory, evaluated_by_layers
from lolcats_core.evaluation.control import control_settings
from lolcats_core.evaluation.results import model_hash
from lolcats_core.evaluation.streamed_perplexity import streamed_perplexity
from lolcats_core.model.map_files import write_feature_maps
from lolcats_core.model.modeling import initial_feature_maps
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.teacher.pin import Teacher
from lolcats_core.training.losses import plain_model
from lolcats_core.training.perplexity import PerplexityResult, perplexity
from tasks.runner.artifacts import selected
from tasks.runner.stage import Stage

# Rows beyond the training length, where the teacher's context allows it.
LONG_FACTOR = 8


class Models:
    """The model at each step: ``teacher``; ``control``, with plain windows of the student's bytes instead of linear
    attention; ``swapped``, with untrained maps in place of softmax; ``transferred``, with trained ones; ``finetuned``.

    Attributes:
        by_layer: whether the weights leave no room on the device. Then only `perplexity` is there.
    """

    def __init__(self, stage: Stage, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.stage, self.teacher = stage, Teacher.open(stage.input("teacher"))
        self.device = resolve_device(stage.params.compute.device)
        self.dtype = resolve_dtype(stage.params.compute.precision)
        shape = ModelShape.from_config(self.teacher.config)
        self.by_layer = evaluated_by_layers(stage.params, shape, device_memory(self.device))
        self._loaded: dict[str, PreTrainedModel] = {}
        self._hashes: dict[str, str] = {}

    def get(self, step: str) -> PreTrainedModel:
        """The whole model of one step; in memory are at most the teacher's and one student's weights."""
        if step not in self._loaded:
            shared = {} if step == "finetuned" else {"teacher": self._loaded.get("teacher")}
            self._loaded = {name: model for name, model in shared.items() if model is not None}
            self._loaded[step] = self._load(step)
        return self._loaded[step]

    @cached_property
    def control(self) -> LinearizeConfig | None:
        """Settings of the control, its bytes counted at `long_tokens`; None where there is none."""
        settings, _ = selected(self.stage)
        return control_settings(self.teacher.config, settings, self.dtype, self.long_tokens)

    @cached_property
    def long_tokens(self) -> int:
        """Tokens of the rows that are longer than those of training, as far as the teacher's context allows it."""
        length = LONG_FACTOR * self.sequence_length
        return min(length, self.teacher.context) if self.teacher.context else length

    def hash(self, step: str) -> str:
        """`model_hash` of one step's whole model."""
        if step not in self._hashes:
            self._hashes[step] = model_hash(self.get(step))
        return self._hashes[step]

    def perplexity(self, step: str, rows: TokenRows) -> PerplexityResult:
        """Next-token perplexity of one step's model over the rows that `evaluate` measures it on."""
        params, name = self.stage.params.evaluate, f"the {step} model"
        options: dict[str, Any] = {"batch_size": params.batch_size, "max_rows": params.max_perplexity_rows}
        if self.by_layer:
            with closing(self._open_layers(step)) as model:
                return streamed_perplexity(model, rows, folder=self.stage.scratch / "hidden", name=name, **options)
        count = len(rows) if params.max_perplexity_rows is None else min(len(rows), params.max_perplexity_rows)
        with progress(count, f"perplexity of {name}") as bar:
            return perplexity(self.get(step), rows, name=name, on_rows=bar.update, **options)

    def _load(self, step: str) -> PreTrainedModel:
        stage = self.stage
        if step == "teacher":
            return self.teacher.load(self.dtype, self.device)
        if step == "finetuned":
            return self._load_finetuned(stage.input("finetune") / "model")
        if step == "control":
            assert self.control is not None, "there is no control"
            control = linearize(self.get("teacher"), self.control, seed=stage.params.seed)
            return self._tuned(control) if stage.params.evaluate.control == "trained" else control
        settings, maps = selected(stage)
        student = linearize(self.get("teacher"), settings, seed=stage.params.seed)
        if step == "transferred":
            load_feature_maps(student, maps)
        return student

    def _tuned(self, control: PreTrainedModel) -> PreTrainedModel:
        """The control after the student's stage 2; a killed evaluation continues it."""
        params = self.stage.params
        train_rows, validation_rows = open_split(self.stage.input("prepare"))
        adapted, _ = low_rank_finetune(
            control,
            train_rows,
            validation_rows,
            params.finetune,
            scratch=self.stage.scratch / "control",
            seed=params.seed,
            gradient_checkpointing=params.compute.gradient_checkpointing,
            offload_activations=params.compute.offload_activations,
        )
        return plain_model(adapted)

    def _load_finetuned(self, path: Path) -> PreTrainedModel:
        check_folder(path, str(path))
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        except OSError as error:
            raise UserError(f"{path}: does not load ({error}); run stage `finetune` again") from error
        return cast(PreTrainedModel, model.to(self.device).eval())  # type: ignore[arg-type]

    def _open_layers(self, step: str) -> LayerwiseModel:
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if step == "finetuned":
            folder = self.stage.input("finetune") / "model"
            check_folder(folder, str(folder))
            return LayerwiseModel.open(folder, AutoConfig.from_pretrained(folder), **where)
        if step != "teacher":
            settings, trained = selected(self.stage)
            maps = trained if step == "transferred" else self._untrained(settings)
            where |= {"settings": settings, "maps": maps}
        return LayerwiseModel.open(self.teacher.folder, self.teacher.config, **where)

    def _untrained(self, settings: LinearizeConfig) -> Path:
        path = self.stage.scratch / "untrained.safetensors"
        maps = initial_feature_maps(self.teacher.config, settings, self.stage.params.seed)
        write_feature_maps(maps, settings, path)
        return path

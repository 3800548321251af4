"""Which parameters each stage reads: all eight run on a tiny teacher, with a `Params` that notes what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.files import write_json
from lolcats_common.params import Params, params_from_dict
from lolcats_core.compute.device import resolve_device
from tasks import evaluate, finetune, inputs, prepare, report, select, teacher, transfer
from tasks.measurements import models
from tests.core.evaluation.test_code_continuation import code
from tests.core.tiny import byte_teacher, byte_tokenizer

TRAINING = {"batch_size": 2, "epochs": 1, "max_steps": 1, "max_eval_rows": 2}
VALUES: dict[str, Any] = {
    "compute": {"device": "cpu"},
    "teacher": {"source": "./model"},
    "data": {"source": "text", "sequence_length": 128, "validation_share": 0.3, "max_train_tokens": 1024},
    "linearize": {"window_size": 8, "feature_dim": 8},
    "transfer": TRAINING,
    "select": {"softmax_budget": {"cache_ratio": 0.25}, "criterion": "greedy_kl", "rows": 1},
    "finetune": {**TRAINING, "lora_rank": 2, "loss": "mixed", "hidden_weight": 0.5},
    "evaluate": {
        "max_perplexity_rows": 2,
        "recall_gaps": [16],
        "recall_samples": 2,
        "tasks": ["copy"],
        "synthetic_lengths": [128],
        "synthetic_samples": 1,
        "long_rows": 1,
        "generation_prompts": 1,
        "generation_tokens": 4,
        "audit_rows": 1,
    },
}


def watched(value: Any, read: set[str], prefix: str = "") -> Any:
    """A copy of a dataclass that adds to `read` the dotted name of each value that is asked for.

    Sections are no values. Who takes a section as a whole (`vars`, `dataclasses.replace`, its text) asks for all of it.
    """
    cls, names = type(value), {field.name for field in dataclasses.fields(value)}

    def note(self: Any, key: str) -> Any:
        found = object.__getattribute__(self, key)
        if key in names and not dataclasses.is_dataclass(found):
            read.add(f"{prefix}{key}")
        elif key == "__dict__":
            read.update(leaves(value, prefix))
        return found

    made = object.__new__(type(cls.__name__, (cls,), {"__getattribute__": note}))
    for name in names:
        item = getattr(value, name)
        section = dataclasses.is_dataclass(item)
        object.__setattr__(made, name, watched(item, read, f"{prefix}{name}.") if section else item)
    return made


def leaves(value: Any, prefix: str = "") -> set[str]:
    """The dotted name of each value in a dataclass."""
    found: set[str] = set()
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{prefix}{field.name}"
        found |= leaves(item, f"{name}.") if dataclasses.is_dataclass(item) else {name}
    return found


class RecordedStage:
    """A stage without a harness, whose `params` are `watched`."""

    def __init__(self, root: Path, name: str, params: Params, variant: str = "") -> None:
        self.root, self.name, self.read = root, name, set[str]()
        self.params: Params = watched(params, self.read)
        # A second run of the stage with other parameters leaves the first's results to the stages behind it.
        self.out = root / "outputs" / name if not variant else root / "variants" / variant / name
        self.scratch, self.results = root / "scratch" / name / (variant or "main"), root / "results"
        for folder in (self.out, self.scratch):
            folder.mkdir(parents=True)

    def input(self, stage: str) -> Path:
        return self.root / "outputs" / stage

    def device(self) -> torch.device:
        return resolve_device(self.params.compute.device)

    def log_metrics(self, *values: Any) -> None: ...
    def log_figure(self, *values: Any) -> None: ...
    def log_text(self, *values: Any) -> None: ...
    def log_dataset(self, *values: Any) -> None: ...


def parameters_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The dotted names of the parameters that each stage's work reads, its other ways of running included."""
    byte_teacher().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text").mkdir()
    for index in range(24):
        (root / "text" / f"{index}.py").write_text(code(20).replace("\n", f"  # {index}\n", 3))

    read: dict[str, set[str]] = {}
    stages: dict[str, Callable[[Any], Mapping[str, float]]] = {
        "inputs": inputs.run,
        "teacher": teacher.run,
        "prepare": prepare.run,
        "transfer": transfer.run,
        "select": select.run,
        "finetune": finetune.run,
        "evaluate": evaluate.run,
        "report": report.run,
    }
    others = {
        "transfer": {"transfer": {"mode": "streamed"}},
        "finetune": {"finetune": {"quantize_base": True}},
        "evaluate": {"evaluate": {"control": "trained"}},
    }
    for name, run in stages.items():
        stage = RecordedStage(root, name, params_from_dict(VALUES))
        write_json(stage.out / "metrics.json", dict(run(stage)))
        write_json(stage.out / "run.json", {"run_id": "r", "key": "k"})
        read[name] = stage.read
        if name in others:
            (section, change), *_ = others[name].items()
            again = RecordedStage(root, name, params_from_dict({**VALUES, section: {**VALUES[section], **change}}), "b")
            run(again)
            read[name] |= again.read
    monkeypatch.setattr(models, "device_memory", lambda device: 0.0)
    layered = RecordedStage(root, "evaluate", params_from_dict(VALUES), "layers")
    evaluate.run(layered)  # type: ignore[arg-type]
    read["evaluate"] |= layered.read
    return read

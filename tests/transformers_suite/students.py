"""transformers' own tests of its models, over tiny students: each passes or stands in `NOT_OURS` with its reason.

`make test-suite` fetches the tests from the source distribution of the pinned version and runs this file;
no other run collects it. The distribution holds the files of tests/ alone and none of its folders, so the tests of
`generate` and of exporters, which lie in folders, are not among them.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.families import FAMILIES, PREFIX
from lolcats_core.model.modeling import AUTO_CLASSES
from tests.core.tiny import BOUNDED, MIXED, SETTINGS, VOCAB, tiny_student, tokens

PACKAGE = "transformers_tests"
TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


def _model_tests() -> Any:
    """`test_modeling_common` of the distribution unpacked at TRANSFORMERS_SUITE."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(Path(os.environ["TRANSFORMERS_SUITE"]) / "tests")]
    sys.modules[PACKAGE] = package
    for name, absent in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        for path in (name.partition(".")[0], name):
            sys.modules[f"{PACKAGE}.{path}"] = ModuleType(f"{PACKAGE}.{path}")
        setattr(sys.modules[f"{PACKAGE}.{name}"], absent, type(absent, (), {}))
    tests = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    # By these tables the tests know which labels a class takes, and which classes take none.
    for name in FAMILIES:
        classes = AUTO_CLASSES[PREFIX + name]
        for auto, table in TABLES.items():
            if auto in classes:
                getattr(tests, table)[PREFIX + name] = classes[auto].__name__
    return tests


class Tester:
    """What transformers' tests ask for: a configuration, inputs for it, and their sizes."""

    batch_size, seq_length = 2, 20

    def __init__(self, family: str, settings: LinearizeConfig) -> None:
        self.family, self.settings, self.is_training = family, settings, True
        config = self.config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads, self.vocab_size = config.num_attention_heads, VOCAB

    def config(self) -> Any:
        return copy.deepcopy(tiny_student(self.family, self.settings).config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = tokens(self.batch_size, self.seq_length)
        config = self.config()
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


VARIANTS = {
    "NothingKept": ("llama", SETTINGS),
    "KeptLayersAndHeads": ("qwen3", MIXED),
    "KeptLayers": ("gemma2", LinearizeConfig(window_size=8, feature_dim=8, softmax_layers=(0,))),
    "Sinks": ("mistral", BOUNDED),
}
_ATTENTION = "a linearized model has one attention function and builds no attention weights; others are refused by name"
# By the beginning of a test's name: why it asks for what a linearized model does not have.
NOT_OURS: dict[str, str] = {
    "test_eager_matches_sdpa_inference": _ATTENTION,
    "test_can_set_attention_dynamically": _ATTENTION,
    "test_sdpa_can_dispatch": _ATTENTION,
    "test_retain_grad_hidden_states_attentions": _ATTENTION,
    "test_model_weights_reload_no_missing_tied_weights": "a checkpoint without feature maps is refused, not filled",
    "test_generation_tester_mixin_inheritance": "the tests of `generate` are not in the distribution",
    "test_capture_outputs_decorator": _ATTENTION,
    "test_num_layers_is_small": "three layers, one of each kind",
}


def _variant(name: str, family: str, settings: LinearizeConfig, tests: Any) -> type:
    def set_up(self: Any) -> None:
        self.model_tester = Tester(family, settings)

    models = tuple(model for auto, model in AUTO_CLASSES[PREFIX + family].items() if auto != "AutoConfig")
    skipped = {
        test: unittest.skip(reason)(lambda self: None)
        for beginning, reason in NOT_OURS.items()
        for test in dir(tests.ModelTesterMixin)
        if test.startswith(beginning)
    }
    body = {
        "setUp": set_up,
        "all_model_classes": models,
        "has_attentions": False,
        "all_generative_model_classes": models[:1],
        **skipped,
    }
    return type(name, (tests.ModelTesterMixin, unittest.TestCase), {"__module__": __name__, **body})


for _name, (_family, _settings) in VARIANTS.items():
    globals()[_name] = _variant(_name, _family, _settings, _model_tests())

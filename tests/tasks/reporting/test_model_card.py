"""The model card: results as the Hub reads them, and what a reader must know."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tasks.reporting.model_card import Facts, model_card
from tests import golden
from tests.tasks.test_report import EVALUATION

FACTS = Facts(
    title="demo version 3",
    name="demo",
    form="merged",
    config={
        "model_type": "lolcats_llama",
        "linearize": {"window": "terraced", "window_size": 64, "softmax_layers": [4]},
    },
    teacher={"kind": "hub", "source": "owner/name", "revision": "0" * 40, "context": 8192, "digest": "d1"},
    params={"seed": 0, "data": {"source": "corpus.jsonl"}, "finetune": {"lora_rank": 8}, "compute": {"device": "cpu"}},
    evaluation=EVALUATION,  # type: ignore[arg-type]
    lineage={"registered": "demo version 3", "git.commit": "abc|def", "gpu": "None", "perplexity.teacher": "8.0"},
)


@pytest.mark.parametrize("form", ["merged", "delta"])
def test_the_card_is_the_golden_one(form: str) -> None:
    golden.check(model_card(replace(FACTS, form=form)).content, f"model_card_{form}.md")


@pytest.mark.parametrize(
    ("settings", "state", "said"),
    [
        ({}, {}, ". The decode state does not grow."),
        (
            {"softmax_layers": [4]},
            {},
            "layers 4. The key/value cache of what keeps softmax attention grows; the",
        ),
        (
            {"softmax_heads": {"10": [0], "5": [0, 1]}},
            {"per_token": 128, "teacher_per_token": 1536},
            "key/value heads 0, 1 of layer 5, key/value heads 0 of layer 10. The key/value cache of what keeps softmax "
            "attention grows by 128 bytes a token, 8.3% of the teacher's;",
        ),
        (
            {"softmax_layers": [4], "softmax_window": 256},
            {},
            "not grow: what keeps softmax attention sees the 256",
        ),
        ({"softmax_layers": [4]}, {"per_token": 0, "teacher_per_token": 0}, ". The decode state does not grow."),
    ],
)
def test_the_card_says_what_keeps_softmax_and_whether_the_decode_state_grows(
    settings: dict[str, Any], state: dict[str, Any], said: str
) -> None:
    config = {"model_type": "lolcats_llama", "linearize": {"window": "terraced", "window_size": 64, **settings}}
    assert said in model_card(replace(FACTS, config=config, evaluation={"state": state})).content  # type: ignore


def test_the_recipe_has_no_empty_lists_of_layers_and_heads() -> None:
    linearize = {"window": "terraced", "softmax_layers": [], "softmax_heads": {}, "softmax_window": None}
    recipe = model_card(replace(FACTS, params={"linearize": linearize})).content.partition("## Recipe")[2]
    assert "softmax_window: null" in recipe
    assert not re.search(r"softmax_(heads|layers)", recipe)


def test_a_card_has_the_teacher_s_licence_or_says_that_it_is_not_known() -> None:
    known = model_card(replace(FACTS, licence="llama3.1"))
    assert known.data.license == "llama3.1"
    assert "its licence applies to them: `llama3.1`." in known.content
    unknown = model_card(FACTS)
    assert (unknown.data.license, unknown.data.license_link) == ("other", "https://huggingface.co/owner/name")
    assert "look it up before you pass the model on" in unknown.content


def test_results_reach_the_hub_as_metadata_with_their_standard_errors() -> None:
    data = ModelCard(model_card(FACTS).content).data
    results = {(found.dataset_type, found.metric_type): found.metric_value for found in data.eval_results or []}
    assert results["validation", "perplexity"] == 10.0
    assert results["copying_recall", "recall_1024_stderr"] == 0.125
    assert results["needle", "acc"] == 0.5
    assert data.base_model == "owner/name"


def test_a_version_that_kept_nothing_has_a_card_too() -> None:
    bare: dict[str, Any] = {"evaluation": {}, "params": {}, "teacher": {}, "lineage": {}}
    text = model_card(replace(FACTS, **bare)).content
    for words in ("None were kept with this version.", "Not kept with this version.", "recall was not measured"):
        assert words in text


def test_a_name_with_line_breaks_adds_no_heading_and_no_metadata() -> None:
    evil = "demo\n---\nlicense: mit\n---\n# Injected\n```\n# Injected\n"
    facts = replace(
        FACTS,
        title=evil,
        name=evil,
        licence=evil,
        teacher={"kind": "directory", "source": evil, "revision": evil, "digest": evil},
        params={"data": {"source": evil}},
        evaluation={**EVALUATION, "tasks": {evil: EVALUATION["tasks"]["needle"]}},  # type: ignore[arg-type]
        lineage={"registered": evil, "git.commit": evil},
        config={"model_type": evil, "linearize": {"window": evil, "feature_map": evil}},
    )
    before, after = model_card(FACTS).content, model_card(facts).content
    text = after.partition("\n## Recipe")[0]
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# demo\\n---")
    assert headings[1:] == [line for line in before.partition("\n## Recipe")[0].splitlines() if line.startswith("## ")]
    assert ModelCard(after).data.license != "mit"
    assert after.count("\n---\n") == before.count("\n---\n")
    recipe = after.partition("## Recipe\n")[2].strip()
    fence = recipe.partition("yaml")[0]
    assert recipe.endswith(fence)
    assert recipe.count(fence) == 2

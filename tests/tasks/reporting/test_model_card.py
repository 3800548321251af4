"""The model card: results as the Hub reads them, and what a reader must know."""

from __future__ import annotations

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

"""What `lolcats ablate` prints: the paper's table, the other sections, and the verdict on the ordering."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import Params
from lolcats_core.experiments.ablation import Budget, trials
from lolcats_core.experiments.ablation_report import markdown, ordering_lines, published_ordering
from tests import golden
from tests.core.experiments.test_ablation import grid

BASE = LinearizeConfig()


def report(**changed: float) -> dict[str, Any]:
    budget = Budget(steps=20)
    measured = grid(**changed)
    found = []
    for trial in trials(Params(), budget, [("q_proj", "v_proj")]):
        section, _, label = trial.name.partition("/")
        result = measured.get(label.replace("kv_head", "query_head"), {"before": 50.0, "after": 4321.0})
        found.append({"section": section, "label": label, "recall": 0.25, "control": 7.0, **result})
    return {
        "teacher": {"source": "builtin", "parameters": 5_600_000, "perplexity": 9.5, "recall": 1.0},
        "budget": {**dataclasses.asdict(budget), "sequence_length": 512, "transfer_lr": 1e-2, "finetune_lr": 1e-3},
        "rows": found,
        "ordering": [dataclasses.asdict(claim) for claim in published_ordering(measured, BASE)],
    }


def test_the_table_has_the_papers_form_and_says_that_the_ordering_holds() -> None:
    text = markdown(report())
    golden.check(text, "ablation.md")
    assert sum(line.startswith(("| hedgehog", "| t2r")) for line in text.splitlines()) == 12


def test_a_statement_that_fails_is_named_with_its_numbers_and_divergence_is_said() -> None:
    text = markdown(report(**{"t2r, none, query_head, transfer": 3.0}))
    assert "does not hold in full (2 of 4 statements do)" in text
    assert "- DOES NOT HOLD: hedgehog is below t2r" in text
    assert "4 < 3" in text
    diverged = report()
    diverged["rows"][0] |= {"after": None, "recall": None}
    assert "| diverged |" in re.sub(" +", " ", markdown(diverged))


def test_without_the_grid_there_is_no_verdict() -> None:
    partial = report()
    partial["rows"] = [row for row in partial["rows"] if row["section"] == "lora_rank"]
    partial["ordering"] = []
    text = markdown(partial)
    assert "Swap & Finetune" not in text
    assert "ordering" not in text
    assert ordering_lines([]) == []
